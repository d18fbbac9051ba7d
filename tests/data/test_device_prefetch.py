"""Batches on their way to the device; what streams do is tested in tests/gpu."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch

from mimscale.data.config import DataConfig
from mimscale.data.device_prefetch import DevicePrefetcher
from mimscale.data.loader import TrainLoader
from mimscale.data.manifest import Manifest
from mimscale.types import Batch, Needs


def test_on_a_cpu_batches_pass_through_one_by_one(manifest: Manifest) -> None:
    data = DataConfig(shards=str(manifest.folder), image_size=32, workers=0)
    made = list(islice(TrainLoader(manifest, data, Needs(), seed=0, global_batch=4, micro_batch=4, rank=0, world=1), 3))
    asked: list[Batch] = []

    def batches() -> Iterator[Batch]:
        for batch in made:
            asked.append(batch)
            yield batch

    for number, prefetched in enumerate(DevicePrefetcher(batches(), torch.device("cpu"))):
        assert len(asked) == number + 1 and prefetched.raw is made[number] and prefetched.ready is None
        on_device = prefetched.take()
        assert torch.equal(on_device.images, made[number].normalised().images) and on_device.ids is made[number].ids
    assert len(asked) == 3
