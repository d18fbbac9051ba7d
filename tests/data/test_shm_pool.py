"""Batches in shared memory: equal to what was packed, and a slot is free when the last tensor in it is gone."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from typing import Any, Literal

import numpy as np
import pytest
import torch

from mimscale.data import shm_pool
from mimscale.data.config import DataConfig
from mimscale.data.loader import TrainLoader, item_bytes
from mimscale.data.manifest import Manifest
from mimscale.data.shm_pool import PooledItem, SharedMemoryPool, unpack
from mimscale.types import Batch, Damage, Needs, Noise

BYTES = 8 << 20


def batch(number: int, side: int = 400) -> Batch:
    generator = torch.Generator().manual_seed(number)
    return Batch(
        images=torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8, generator=generator),
        ids=torch.arange(3) + number,
        positions=torch.arange(3),
        noise={"mask": torch.rand(3, 5, generator=generator)},
        boxes=torch.rand(3, 4, generator=generator),
        flips=torch.tensor([True, False, True]),
        uncropped=torch.empty(0, 3, 8, 8, dtype=torch.uint8),
        damage=(Damage(1, "a", "b", "c"),),
    )


def same(one: Batch, two: Batch) -> bool:
    tensors = [name for name, value in vars(one).items() if isinstance(value, torch.Tensor)]
    return (
        all(torch.equal(getattr(one, name), getattr(two, name)) for name in tensors)
        and torch.equal(one.noise["mask"], two.noise["mask"])
        and (one.labels, one.damage) == (two.labels, two.damage)
    )


def packed(pool: SharedMemoryPool, number: int) -> PooledItem:
    pooled = pool.pack([batch(number), batch(number + 1)])
    assert isinstance(pooled, PooledItem)
    return pooled


def free_slots(pool: SharedMemoryPool) -> int:
    taken = []
    while (slot := pool._take_slot()) is not None:
        taken.append(slot)
    for slot in taken:
        pool._free_slot(slot)
    return len(taken)


def test_a_slot_is_free_when_its_last_tensor_is_gone() -> None:
    pool = SharedMemoryPool(2, BYTES)
    one, two = packed(pool, 0), packed(pool, 10)
    assert free_slots(pool) == 0 and pool.pack([batch(20)])[0].ids[0] == 20  # type: ignore[index]  # not pooled
    first = unpack(one)
    assert same(first[0], batch(0)) and same(first[1], batch(1)) and free_slots(pool) == 0
    ids, part = first[0].ids, first[1].images[1:, 0]
    del first
    gc.collect()
    assert free_slots(pool) == 0 and torch.equal(part, batch(1).images[1:, 0])
    del part
    gc.collect()
    assert free_slots(pool) == 1 and ids.tolist() == [0, 1, 2]  # small tensors are copies
    assert same(unpack(two)[1], batch(11))
    gc.collect()
    assert free_slots(pool) == 2


def test_a_tensor_outlives_its_pool() -> None:
    pool = SharedMemoryPool(1, BYTES)
    images, number = unpack(packed(pool, 3))[0].images, pool.number
    del pool
    gc.collect()
    assert torch.equal(images, batch(3).images)
    del images
    gc.collect()
    assert number not in shm_pool._POOLS


def test_an_item_larger_than_a_slot_is_not_pooled() -> None:
    pool = SharedMemoryPool(1, 4096)
    item = [batch(0)]
    assert pool.pack(item) is item and free_slots(pool) == 1


def test_item_bytes_is_enough(manifest: Manifest) -> None:
    """Also with uncropped images, labels, and several crops per image."""
    needs = Needs(noise={"mask": Noise("uniform", (7,))}, labels=True, uncropped_images=80)
    data = DataConfig(shards=str(manifest.folder), image_size=32, workers=0, crops=3)
    loader = TrainLoader(manifest, data, needs, seed=0, global_batch=8, micro_batch=8, rank=0, world=1)
    three = list(islice(loader, 3))
    pool = SharedMemoryPool(1, item_bytes(data, needs, 8))
    assert isinstance(pool.pack(three), PooledItem)


@pytest.mark.parametrize(("decoder", "uncropped"), [("simplejpeg", 1024), ("device", 0)])
def test_item_bytes_is_enough_for_small_images(
    manifest: Manifest, decoder: Literal["simplejpeg", "device"], uncropped: int
) -> None:
    """The other tensors are larger than very small images; JPEGs for the device are in the slot too."""
    data = DataConfig(
        shards=str(manifest.folder), image_size=8, workers=1, decoder=decoder, colour_jitter=(0.4, 0.4, 0.4)
    )
    needs = Needs(labels=True, uncropped_images=uncropped)
    loader = TrainLoader(manifest, data, needs, seed=0, global_batch=1024, micro_batch=1024, rank=0, world=1)
    (dataset, _), pool, positions = loader._make_loader.args, loader._make_pool(), np.arange(1024)
    assert pool is not None and isinstance(pool.pack(dataset[positions, positions[None]]), PooledItem)


def _pack_batches(pool: SharedMemoryPool, results: Any) -> None:
    for number in range(6):
        results.put(pool.pack([batch(number)]))


@pytest.mark.multi
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_from_another_process(start: str) -> None:
    """A forked and a spawned worker; a forked child that drops a batch does not free its slot."""
    context: Any = multiprocessing.get_context(start)
    pool = SharedMemoryPool(8, BYTES)
    results = context.Queue()
    worker = context.Process(target=_pack_batches, args=(pool, results))
    worker.start()
    items = [results.get(timeout=60) for _ in range(6)]
    worker.join()
    assert all(isinstance(item, PooledItem) for item in items) and free_slots(pool) == 2
    held = [unpack(item)[0] for item in items]
    assert all(same(one, batch(number)) for number, one in enumerate(held))
    child = os.fork()
    if not child:
        held.clear()
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert free_slots(pool) == 2
    held.clear()
    gc.collect()
    assert free_slots(pool) == 8


@pytest.mark.multi
def test_the_loader_uses_the_pool(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all tensors as views of slots: nothing is overwritten while it is referenced."""
    monkeypatch.setattr(shm_pool, "MIN_VIEW_BYTES", 0)
    needs = Needs(noise={"mask": Noise("exponential", (7,))})
    data = DataConfig(shards=str(manifest.folder), image_size=32, workers=2)

    def first(data: DataConfig, count: int) -> list[Batch]:
        loader = TrainLoader(manifest, data, needs, seed=0, global_batch=8, micro_batch=4, rank=0, world=1)
        batches = list(islice(loader, count))
        loader.close()
        return batches

    held, plain = first(data, 30), first(data.model_copy(update={"workers": 0}), 30)
    assert all(same(replace(one, uncropped=None), two) for one, two in zip(held, plain, strict=True))


def test_a_limit_on_files_that_the_pool_exceeds() -> None:
    """`ulimit -f` holds for anonymous memory too."""
    code = (
        "import resource; from mimscale.data.shm_pool import SharedMemoryPool\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY)); SharedMemoryPool(4, 100_000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UserError" in done.stderr and "of shared memory for the data workers: File too large; raise" in done.stderr
