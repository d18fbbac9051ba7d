"""Erasing and mixing on a GPU: the CPU's images, but for the noise inside erased rectangles."""

from __future__ import annotations

import pytest
import torch

from mimscale.data import augment
from mimscale.data.config import DataConfig
from mimscale.types import Batch, Mixing

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_a_gpu_augments_as_a_cpu_does() -> None:
    count, device = 32, torch.device("cuda")
    random, mixing = torch.Generator().manual_seed(0), Mixing(0.8, 1.0, 1.0, 0.5, classes=10, smoothing=0.1)
    with augment.keyed_generators() as seed:
        seed(1)
        drawn = torch.stack([torch.from_numpy(augment.draw_mixing(mixing, 48)) for _ in range(count // 2)])
    where = torch.arange(count)
    batch = Batch(
        images=torch.randn(count, 3, 48, 48, generator=random),
        ids=where,
        positions=where,
        noise={augment.MIX: drawn.repeat_interleave(2, 0), augment.ERASE: where * 2**40},
        boxes=torch.zeros(count, 4),
        flips=torch.zeros(count, dtype=torch.bool),
        labels=where % 10,
        partners=where ^ 1,
    )
    before = torch.cuda.default_generators[0].get_state()
    data = DataConfig(shards="none", random_erasing=0.5)
    erased = [batch.images.clone().to(place) for place in ("cpu", device)]
    for images in erased:
        augment.erase(images, batch.noise[augment.ERASE], data.random_erasing)
    changed = [images.cpu() != batch.images for images in erased]
    assert torch.equal(*changed) and 0.1 < changed[0].flatten(1).any(1).float().mean() < 0.9
    assert erased[1].cpu()[changed[1]].std() == pytest.approx(1, abs=0.1)
    ours, reference = (augment.mix(batch.to(torch.device(place)), mixing, count) for place in ("cuda", "cpu"))
    assert ours.soft_labels is not None and reference.soft_labels is not None
    torch.testing.assert_close(ours.images.cpu(), reference.images, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.soft_labels.cpu(), reference.soft_labels, atol=1e-6, rtol=0)
    assert torch.equal(torch.cuda.default_generators[0].get_state(), before)
