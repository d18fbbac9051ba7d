"""Copying batches to the device; CUDA streams are tested in tests/gpu."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch

from mimscale.data.config import DataConfig
from mimscale.data.device_prefetch import DevicePrefetcher
from mimscale.data.loader import TrainLoader
from mimscale.data.manifest import Manifest
from mimscale.types import Batch, Needs


def test_on_a_cpu_nothing_is_prefetched(manifest: Manifest) -> None:
    data = DataConfig(shards=str(manifest.folder), image_size=32, workers=0)
    expected = list(
        islice(TrainLoader(manifest, data, Needs(), seed=0, global_batch=4, micro_batch=4, rank=0, world=1), 3)
    )
    requested: list[Batch] = []

    def batches() -> Iterator[Batch]:
        for batch in expected:
            requested.append(batch)
            yield batch

    for number, prefetched in enumerate(DevicePrefetcher(batches(), torch.device("cpu"))):
        assert len(requested) == number + 1 and prefetched.raw is expected[number] and prefetched.ready is None
        on_device = prefetched.take()
        assert (
            torch.equal(on_device.images, expected[number].normalised().images)
            and on_device.ids is expected[number].ids
        )
    assert len(requested) == 3
