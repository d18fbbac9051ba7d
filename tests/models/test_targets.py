"""The low-pass filter against the official one, and against its own definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mimscale.models.targets import images_from_pixels, low_pass, low_pass_disc, pixel_target
from mimscale.types import imagenet_statistics
from tests import golden
from tests.golden import close


def image_of(g: golden.Golden, part: str) -> Tensor:
    if f"{part}image" in g.tensors:
        return g[f"{part}image"]
    return F.interpolate(g[f"{part}image_quarter"], scale_factor=4, mode="nearest")


@pytest.mark.parametrize("part", ["0/", "1/", "2/"])
def test_golden_filter(part: str) -> None:
    g = golden.load("pixmim_filter_dev")
    images, c = image_of(g, part), g.config[part[0]]
    disc = low_pass_disc((c["img"], c["img"]), c["radius"])
    assert torch.equal(torch.fft.fftshift(disc), g[f"{part}filter"].bool())
    assert int(disc.sum()) == c["filter_ones"]
    ours = low_pass(images, c["radius"])
    close(ours, g[f"{part}target"])
    if part != "2/":
        mean, std = imagenet_statistics(images.device)
        close(ours * std + mean, g[f"{part}complex_abs"])


def test_golden_filter_of_pixels_within_range() -> None:
    g = golden.load("pixmim_filter_inrange")
    assert torch.equal(torch.fft.fftshift(low_pass_disc((96, 96), g.config["radius"])), g["filter"].bool())
    close(low_pass(g["image"], g.config["radius"]), g["target"])


@pytest.mark.parametrize("size", [(6, 6), (7, 7), (9, 12)])
@pytest.mark.parametrize("radius", [2.0, 2.5, 3.0])
def test_disc_is_round_about_the_middle_of_the_array(size: tuple[int, int], radius: float) -> None:
    height, width = size
    middle = ((height - 1) / 2, (width - 1) / 2)
    expected = [[(i - middle[0]) ** 2 + (j - middle[1]) ** 2 <= radius**2 for j in range(width)] for i in range(height)]
    assert torch.equal(torch.fft.fftshift(low_pass_disc(size, radius)), torch.tensor(expected))


def test_what_the_filter_does() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 48, 64, generator=generator) * 0.3
    mean, std = imagenet_statistics(images.device)
    close(low_pass(images, 100.0), ((images * std + mean).abs() - mean) / std)  # nothing is cut off
    flat = torch.full((1, 3, 48, 64), 0.2)
    close(low_pass(flat, 3.0), flat)
    x = torch.arange(64) / 64
    for cycles, kept in ((2, True), (20, False)):
        wave = flat + 0.3 * torch.sin(2 * torch.pi * cycles * x)
        close(low_pass(wave, 8.0), wave if kept else flat)
    assert low_pass(images.double().requires_grad_(), 8.0).dtype == torch.float32
    assert not low_pass(images.requires_grad_(), 8.0).requires_grad


@pytest.mark.parametrize("normalise", [True, False])
def test_pixels_and_back_on_a_grid_that_is_not_square(normalise: bool) -> None:
    images = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(1))
    pixels = pixel_target(images, 8, normalise)
    assert pixels.shape == (2, 15, 192)
    if normalise:
        torch.testing.assert_close(pixels.std(dim=-1), torch.ones(2, 15), atol=1e-4, rtol=0)
    torch.testing.assert_close(images_from_pixels(pixels, images, 8, normalise), images, atol=1e-5, rtol=0)
