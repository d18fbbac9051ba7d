"""Colour jitter: the loader draws the random factors with all other noise, the arithmetic runs on the device."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimscale.data import noise
from mimscale.types import Batch, in_float, normalised

PURPOSE = "colour"  # key in `Batch.noise`: float32 [B, 6], see `draw_factors`
GREY = (0.2989, 0.587, 0.114)  # torchvision's weights
_ORDERS = np.array(list(permutations(range(3))), np.float32)
_BRIGHTNESS, _CONTRAST = 0, 1


def draw_factors(strengths: tuple[float, float, float], seed: int, epoch: int, index: int) -> NDArray[np.float32]:
    """float32 [6]: factors of brightness, contrast and saturation, each uniform in [max(0, 1 - s), 1 + s], then the
    order in which these (0, 1, 2) are applied, as torchvision's ColorJitter draws them.

    index: position of the sample in its epoch.
    """
    numbers = noise.uniform(seed, PURPOSE, epoch, index, n=4)
    strength = np.array(strengths, np.float32)
    low = np.maximum(0, 1 - strength)
    factors = low + (1 + strength - low) * numbers[:3]
    return np.concatenate([factors, _ORDERS[int(6 * numbers[3])]])


def apply_jitter(images_B3HW: Tensor, colour_B6: Tensor) -> Tensor:
    """float images in 0..1 -> float images in 0..1, each with its own factors in its own order.

    Each operation blends an image with a second one, as torchvision does: black for brightness, the mean grey of the
    image for contrast, the greyscale image for saturation.
    """
    for step in range(3):
        which_B = colour_B6[:, 3 + step].long()
        factor, which = (value.view(-1, 1, 1, 1) for value in (colour_B6.gather(1, which_B[:, None]), which_B))
        red, green, blue = (weight * images_B3HW[:, c : c + 1] for c, weight in enumerate(GREY))
        grey = red + green + blue
        other = torch.where(which == _CONTRAST, grey.mean((1, 2, 3), keepdim=True), grey)
        other = other.masked_fill(which == _BRIGHTNESS, 0)
        images_B3HW = torch.lerp(other, images_B3HW, factor).clamp(0, 1)
    return images_B3HW


def jitter_and_normalise(batch: Batch) -> Batch:
    """uint8 images -> float32, normalised; before that jittered, if the loader drew factors for it."""
    if PURPOSE not in batch.noise:
        return batch.normalised()
    images = apply_jitter(in_float(batch.images) / 255, batch.noise[PURPOSE])
    return replace(batch, images=normalised(images * 255))
