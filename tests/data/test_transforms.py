"""Crop boxes and pixels against torchvision, which the published recipes used."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tv

from mimscale.data import noise
from mimscale.data.synthetic import synthetic_image
from mimscale.data.transforms import (
    CROP_NUMBERS,
    TRIES,
    center_crop,
    padded_crop,
    padded_crop_box,
    random_resized_crop_box,
    resized_crop,
    resized_short_side,
    resized_size,
    to_pixels,
)
from tests import golden

MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def image(height: int, width: int, number: int = 0) -> Image.Image:
    return Image.fromarray(synthetic_image(0, 3, 300, 0, number)).resize((width, height))


def numbers(index: int) -> list[float]:
    return noise.uniform(0, "test", index, n=CROP_NUMBERS).tolist()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(120, 160), (31, 200), (17, 19)])
def test_pixels_equal_torchvisions_resized_crop(interpolation, size: tuple[int, int]) -> None:
    source = image(*size)
    for index in range(10):
        box = random_resized_crop_box(size, SCALE, RATIO, numbers(index))
        ours = resized_crop(source, box, 64, interpolation)
        theirs = tv.resized_crop(source, *box, [64, 64], MODES[interpolation])
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
        flipped = np.asarray(tv.horizontal_flip(theirs)).transpose(2, 0, 1)
        assert np.array_equal(to_pixels(ours, flip=True), flipped)


class GivenNumbers(v2.RandomResizedCrop):
    """torchvision's own algorithm with given random numbers."""

    def boxes(self, source: Image.Image, given_numbers: list[float], monkeypatch: pytest.MonkeyPatch) -> tuple:
        script = iter([x for pair in zip(given_numbers[:TRIES], given_numbers[TRIES:], strict=False) for x in pair])
        corners = iter(given_numbers[2 * TRIES :])

        def uniform_(tensor: torch.Tensor, low: float, high: float) -> torch.Tensor:
            return tensor.double().fill_(low + (high - low) * next(script))

        def randint(low: int, high: int, size: tuple[int, ...]) -> torch.Tensor:
            return torch.tensor([low + int(next(corners) * (high - low))])

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "uniform_", uniform_)
            patch.setattr(torch, "randint", randint)
            box = self.make_params([source])
        return box["top"], box["left"], box["height"], box["width"]


@pytest.mark.parametrize("size", [(120, 160), (300, 40), (40, 300), (1, 1), (5, 500), (224, 224)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.67, 1.0), (0.08, 1.0), (1.0, 1.0)])
def test_boxes_equal_torchvisions_algorithm(size, scale, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries, rounding, ends of the ranges and the fallback, box by box."""
    theirs, source = GivenNumbers(8, scale=scale, ratio=RATIO), image(*size)
    for index in range(40):
        expected = theirs.boxes(source, numbers(index), monkeypatch)
        assert random_resized_crop_box(size, scale, RATIO, numbers(index)) == expected


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 10**6), st.floats(0.01, 1), st.floats(0.3, 1))
def test_boxes_lie_inside(height: int, width: int, index: int, low: float, ratio: float) -> None:
    top, left, h, w = random_resized_crop_box((height, width), (low, 1.0), (ratio, 1 / ratio), numbers(index))
    assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width and h and w


def test_distribution_of_area_and_aspect_ratio() -> None:
    boxes = np.array([random_resized_crop_box((400, 400), SCALE, RATIO, numbers(index)) for index in range(4000)])
    area, ratio = boxes[:, 2] * boxes[:, 3] / 160_000, np.log(boxes[:, 3] / boxes[:, 2])
    assert (
        abs(np.median(area[area < 0.7]) - 0.45) < 0.02
    )  # below 0.75 no ratio is ever rejected, so the area is uniform there
    assert abs(ratio.mean()) < 0.02 and abs(ratio.min() + math.log(4 / 3)) < 0.02


def test_padded_crop_of_the_release() -> None:
    """The stored seed gives torchvision's corner and flip; the pixels are made by our code."""
    g = golden.load("pixmim_crop")
    side, padding = 32, 4
    for row, (width, height, seed) in enumerate(g["W_H_seed"].tolist()):
        source = Image.fromarray(g[f"{row}/input_hwc"].numpy())
        assert source.size == (width, height)
        small = resized_short_side(source, side, "bilinear")
        torch.manual_seed(seed)
        padded = Image.new("RGB", (small.width + 2 * padding, small.height + 2 * padding))
        top, left, h, w = v1.RandomCrop.get_params(padded, (side, side))
        flip = bool(torch.rand(1) < 0.5)
        ours = to_pixels(padded_crop(small, (top - padding, left - padding, h, w), padding), flip)
        golden.equal(torch.from_numpy(ours.transpose(1, 2, 0).copy()), g[f"{row}/output_hwc"], "pixel")


@pytest.mark.parametrize("size", [(120, 160), (300, 40), (31, 33), (32, 32)])
@pytest.mark.parametrize("padding", [0, 4, 31])
def test_padded_boxes_equal_torchvisions_algorithm(size, padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Corner by corner, with torchvision's random draw replaced by our numbers; then the pixels in the box."""
    small = resized_short_side(image(*size), 32, "bilinear")
    assert min(small.size) == 32
    theirs = v1.RandomCrop(32, padding=padding, padding_mode="reflect")
    for index in range(20):
        given_numbers = numbers(index)[-3:-1]
        script = iter(given_numbers)

        def randint(low: int, high: int, size: tuple[int, ...], script=script) -> torch.Tensor:
            return torch.tensor([low + int(next(script) * (high - low))])

        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", randint)
            expected = theirs(small)
        box = padded_crop_box((small.height, small.width), 32, padding, given_numbers)
        assert np.array_equal(np.asarray(padded_crop(small, box, padding)), np.asarray(expected))


@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 20), st.floats(0, 1, exclude_max=True))
def test_padded_boxes_reach_no_further_than_the_padding(height: int, width: int, padding: int, number: float) -> None:
    size = resized_size((height, width), 24)
    assert min(size) == 24
    top, left, h, w = padded_crop_box(size, 24, padding, [number, number])
    assert -padding <= top and top + h <= size[0] + padding and -padding <= left and left + w <= size[1] + padding


@pytest.mark.parametrize("size", [(120, 160), (333, 97), (64, 64), (20, 90)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0, 0.9])
def test_evaluation_crop_equals_torchvisions(size: tuple[int, int], crop_pct: float) -> None:
    source, side = image(*size), 64
    ours, box = center_crop(source, side, crop_pct)
    theirs = v2.CenterCrop(side)(v2.Resize(round(side / crop_pct), InterpolationMode.BICUBIC)(source))
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    top, left, height, width = box
    assert math.isclose(max(height, width), side / round(side / crop_pct))  # of the short side
    assert abs(top + height / 2 - 0.5) < 0.01 and abs(left + width / 2 - 0.5) < 0.01
