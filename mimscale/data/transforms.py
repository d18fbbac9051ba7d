"""Crop boxes as pure functions of given random numbers, and the pixels inside a box.

The results equal those of torchvision's RandomResizedCrop, RandomCrop, Resize and CenterCrop on Pillow images, given
the same random numbers. An `ArrayImage` (see decode.py) takes the same code path with torch's resize. Boxes are
(top, left, height, width) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mimscale.data.decode import AnyImage

Box = tuple[int, int, int, int]
Interpolation = Literal["bilinear", "bicubic"]
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
TRIES = 10
CROP_NUMBERS = 2 * TRIES + 3  # area and ratio of each try; top, left; flip


def random_resized_crop_box(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], numbers: Sequence[float]
) -> Box:
    """Box of a random resized crop (Szegedy et al. 2015, as in torchvision): area uniform, aspect ratio log-uniform.

    size: (height, width) of the image. numbers: in [0, 1), at least 2 * TRIES + 2. If none of ten tries fits into the
    image: the largest center crop whose aspect ratio is allowed.
    """
    height, width = size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for area_number, ratio_number in zip(numbers[:TRIES], numbers[TRIES : 2 * TRIES], strict=True):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_number)
        aspect = math.exp(low + (high - low) * ratio_number)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = numbers[2 * TRIES : 2 * TRIES + 2]
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crop(image: AnyImage, box: Box, side: int, interpolation: Interpolation) -> AnyImage:
    """The box, resized to side x side. Pixels outside the box have no influence."""
    top, left, height, width = box
    return image.crop((left, top, left + width, top + height)).resize((side, side), RESAMPLING[interpolation])


def resized_size(size: tuple[int, int], short: int) -> tuple[int, int]:
    """(height, width) with the same aspect, up to rounding, whose shorter side is `short`."""
    height, width = size
    return max(short, int(short * height / width)), max(short, int(short * width / height))


def resized_short_side(image: AnyImage, short: int, interpolation: Interpolation) -> AnyImage:
    """The uncropped image, resized so that its short side is `short` pixels."""
    height, width = resized_size((image.height, image.width), short)
    return image if image.size == (width, height) else image.resize((width, height), RESAMPLING[interpolation])


def resized_to_square(image: AnyImage, side: int, interpolation: Interpolation) -> AnyImage:
    """The uncropped image, resized to side x side without keeping its aspect ratio."""
    return image.resize((side, side), RESAMPLING[interpolation])


def padded_crop_box(size: tuple[int, int], side: int, padding: int, numbers: Sequence[float]) -> Box:
    """A random square of an image whose short side was resized to `side`; it may reach `padding` pixels outside.

    size: (height, width) after the resize. numbers: for top and left, in [0, 1).
    """
    top, left = (int(n * (length + 2 * padding - side + 1)) - padding for n, length in zip(numbers, size, strict=True))
    return top, left, side, side


def padded_crop(image: AnyImage, box: Box, padding: int) -> NDArray[np.uint8]:
    """uint8 [h, w, 3]: the pixels of the box, after reflection padding of the image by `padding` pixels per edge."""
    top, left, height, width = box
    edges = ((padding, padding), (padding, padding), (0, 0))
    padded = np.pad(np.asarray(image), edges, mode="reflect")
    return padded[top + padding : top + padding + height, left + padding : left + padding + width]


def relative_box(box: Box, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box as fractions of the image's size (height, width)."""
    top, left, height, width = box
    return top / size[0], left / size[1], height / size[0], width / size[1]


def center_crop(image: AnyImage, side: int, crop_pct: float) -> tuple[AnyImage, tuple[float, ...]]:
    """Evaluation: resize the short side to round(side / crop_pct) (bicubic), then crop the central side x side.

    Returns the crop, and its box as fractions of the stored image.
    """
    image = resized_short_side(image, round(side / crop_pct), "bicubic")
    top, left = round((image.height - side) / 2), round((image.width - side) / 2)
    box = (top, left, side, side)
    return image.crop((left, top, left + side, top + side)), relative_box(box, (image.height, image.width))


def to_pixels(image: AnyImage | NDArray[np.uint8], flip: bool = False) -> NDArray[np.uint8]:
    """uint8 [3, H, W], colours next to each other in memory; flip: mirrored left-right."""
    array = np.asarray(image)
    if flip:  # torch's takes a fifth of the time of numpy's
        array = torch.from_numpy(array if array.flags.writeable else array.copy()).flip(1).numpy()
    return array.transpose(2, 0, 1)
