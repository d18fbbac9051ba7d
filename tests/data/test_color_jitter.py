"""Colour jitter on the device against torchvision's and Pillow's, with given factors."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torchvision.transforms.v2 import functional as F

from mimscale.data.color_jitter import PURPOSE, apply_jitter, draw_factors, jitter_and_normalise
from mimscale.data.config import DataConfig
from mimscale.data.loader import TrainLoader
from mimscale.data.manifest import Manifest
from mimscale.data.synthetic import synthetic_image
from mimscale.types import Batch, Needs
from tests.data.test_decode import psnr

STRENGTHS = (0.4, 0.3, 1.5)
IMAGES = torch.stack(
    [torch.from_numpy(synthetic_image(n, 12, 64, 0, n)[:24, :24].copy()).permute(2, 0, 1) for n in range(12)]
)
FACTORS = torch.from_numpy(np.stack([draw_factors(STRENGTHS, 0, 0, n) for n in range(12)]))


def test_equal_to_torchvision() -> None:
    ours = apply_jitter(IMAGES.float() / 255, FACTORS)
    assert len({tuple(row[3:].tolist()) for row in FACTORS}) > 3
    for image, factors, found in zip(IMAGES, FACTORS, ours, strict=True):
        expected = image.float() / 255
        for which in factors[3:].int().tolist():
            change = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[which]
            expected = change(expected, float(factors[which]))
        assert torch.allclose(found, expected, atol=2e-6)
        assert not torch.allclose(found, image.float() / 255, atol=1e-2)


def test_close_to_pillow() -> None:
    """Pillow rounds down to 8 bits after every operation: 44 dB."""
    found = []
    for image, factors, ours in zip(IMAGES, FACTORS, apply_jitter(IMAGES.float() / 255, FACTORS), strict=True):
        plain = Image.fromarray(image.permute(1, 2, 0).numpy())
        for which in factors[3:].int().tolist():
            kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[which]
            plain = kind(plain).enhance(float(factors[which]))
        found.append(psnr(plain, (ours * 255).permute(1, 2, 0).numpy()))
    assert np.mean(found) > 42


def test_range_and_mean_of_the_factors() -> None:
    many = np.stack([draw_factors(STRENGTHS, 1, 2, n) for n in range(2000)])
    for column, strength in enumerate(STRENGTHS):
        low, high = max(0, 1 - strength), 1 + strength
        values = many[:, column]
        assert low <= values.min() < low + 0.02 and high - 0.02 < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.05
    assert (np.sort(many[:, 3:], axis=1) == [0, 1, 2]).all() and len(np.unique(many[:, 3:], axis=0)) == 6


def batches(manifest: Manifest, **changes) -> list[Batch]:
    data = DataConfig(shards=str(manifest.folder), image_size=32, workers=0, **changes)
    return list(islice(TrainLoader(manifest, data, Needs(), seed=0, global_batch=4, micro_batch=4, rank=0, world=1), 2))


def test_off_by_default(manifest: Manifest) -> None:
    for plain, coloured in zip(batches(manifest), batches(manifest, colour_jitter=STRENGTHS), strict=True):
        assert plain.noise == {} and torch.equal(jitter_and_normalise(plain).images, plain.normalised().images)
        assert torch.equal(plain.images, coloured.images) and coloured.noise[PURPOSE].shape == (4, 6)
        assert not torch.allclose(jitter_and_normalise(coloured).images, plain.normalised().images, atol=0.1)
        identity = torch.tensor([[1.0, 1, 1, 2, 0, 1]]).expand(4, 6)
        assert torch.allclose(apply_jitter(plain.images.float() / 255, identity), plain.images.float() / 255, atol=1e-6)


def test_factors_depend_on_the_position_alone(manifest: Manifest) -> None:
    """For one or two ranks, one or several micro-batches, and from any first step."""
    data = DataConfig(shards=str(manifest.folder), image_size=32, workers=0, colour_jitter=STRENGTHS)

    def factors_of_rank(rank: int, world: int, micro_batch: int, start: int) -> dict[int, list[float]]:
        sizes: Any = {"global_batch": 8, "micro_batch": micro_batch, "rank": rank, "world": world, "start_step": start}
        loader = TrainLoader(manifest, data, Needs(), seed=0, **sizes)
        found = list(islice(loader, (12 - start) * 8 // world // micro_batch))  # into the second epoch
        rows = [zip(b.positions.tolist(), b.noise[PURPOSE].tolist(), strict=True) for b in found]
        return dict(pair for row in rows for pair in row)

    expected = factors_of_rank(0, 1, 8, 0)
    assert (
        factors_of_rank(0, 2, 2, 0) | factors_of_rank(1, 2, 2, 0) == expected
        and len(set(map(tuple, expected.values()))) == 96
    )
    assert factors_of_rank(0, 1, 4, 9) == {position: row for position, row in expected.items() if position >= 72}


def test_a_negative_strength_is_refused() -> None:
    with pytest.raises(ValueError, match="colour_jitter"):
        DataConfig(shards="x", colour_jitter=(-0.1, 0, 0))
