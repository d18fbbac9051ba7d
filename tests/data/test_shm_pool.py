"""Batches in shared memory: made there, moved in one piece, and the slot is free when the last tensor is gone."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mimscale.data import shm_pool
from mimscale.data.config import DataConfig
from mimscale.data.loader import TrainLoader, batch_bytes
from mimscale.data.manifest import Manifest
from mimscale.data.shm_pool import CopiedItem, PooledItem, SharedMemoryPool, unpack
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
    pool = SharedMemoryPool(2, BYTES, 2)
    one, two = packed(pool, 0), packed(pool, 10)
    assert free_slots(pool) == 0
    first = unpack(one)
    assert same(first[0], batch(0)) and same(first[1], batch(1)) and free_slots(pool) == 0
    ids, part = first[0].ids, first[1].images[1:, 0]
    del first
    gc.collect()
    assert free_slots(pool) == 0 and torch.equal(part, batch(1).images[1:, 0])
    del part
    gc.collect()
    assert free_slots(pool) == 0 and ids.tolist() == [0, 1, 2]
    del ids
    gc.collect()
    assert free_slots(pool) == 1 and same(unpack(two)[1], batch(11))
    gc.collect()
    assert free_slots(pool) == 2


def test_a_tensor_outlives_its_pool() -> None:
    pool = SharedMemoryPool(1, BYTES, 2)
    images, number = unpack(packed(pool, 3))[0].images, pool.number
    del pool
    gc.collect()
    assert torch.equal(images, batch(3).images)
    del images
    gc.collect()
    assert number not in shm_pool._POOLS


@pytest.mark.parametrize(("free", "size"), [(0, BYTES), (1, 4096)])
def test_what_finds_no_slot_is_sent_by_value(free: int, size: int) -> None:
    """None is free, or they are too small."""
    pool = SharedMemoryPool(1, size)
    slot = None if free else pool._take_slot()
    item = pool.pack([batch(0)])
    assert isinstance(item, CopiedItem) and free_slots(pool) == free and slot in (0, None)
    (received,) = unpack(pickle.loads(pickle.dumps(item)))
    assert same(received, batch(0))
    received.images.add_(1)  # as with every batch, this is allowed


def test_images_are_made_in_the_slot() -> None:
    """And nothing is copied before the device: the images have one place from the crop on."""
    pool = SharedMemoryPool(1, BYTES, 2)
    arrays = pool.images(2, (3, 400, 400, 3))
    item = [replace(batch(n), images=torch.from_numpy(array).permute(0, 3, 1, 2)) for n, array in enumerate(arrays)]
    for number, one in enumerate(item):
        one.images.copy_(batch(number).images)
    places = [one.images.data_ptr() for one in item]
    received = unpack(pool.pack(item))
    assert [one.images.data_ptr() for one in received] == places and all(map(same, received, map(batch, range(2))))
    assert received[0].images.is_contiguous(memory_format=torch.channels_last)


def test_a_slot_is_kept_for_the_next_item_when_one_fails() -> None:
    pool = SharedMemoryPool(1, BYTES)
    for _ in range(3):
        (array,) = pool.images(1, (3, 8, 8, 3))
    images = torch.from_numpy(array).permute(0, 3, 1, 2).fill_(7)
    assert isinstance(pool.pack([replace(batch(0), images=images)]), PooledItem)


class Copies(TorchDispatchMode):
    """Bytes of every copy to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten._pin_memory.default):
            self.bytes.append(args[0].nbytes)
        return func(*args, **(kwargs or {}))


def test_a_micro_batch_is_one_copy_of_its_bytes() -> None:
    """To a device without memory, since this test needs none that has it: images stay uint8 on the way."""
    pool = SharedMemoryPool(1, BYTES, 2)
    for received in unpack(packed(pool, 4)):
        with Copies() as copies:
            there = received.to(torch.device("meta"))
        (size,) = copies.bytes
        assert received.images.nbytes < size < received.images.nbytes + 1024
        assert there.images.dtype == torch.uint8 and there.images.is_meta and there.noise["mask"].is_meta
    with Copies() as copies:
        assert received.to(torch.device("cpu")).images is received.images
    assert copies.bytes == []


def test_pieces_keep_their_values() -> None:
    """Moved to other memory on the same device, with tensors of their own beside those of the slot."""
    pool = SharedMemoryPool(1, BYTES, 2)
    received = unpack(packed(pool, 4))[1]
    moved = replace(received, labels=torch.arange(3), importance=torch.zeros(0, 4))._in_pieces(torch.clone)
    assert moved.labels is not None and moved.importance is not None
    assert moved.labels.tolist() == [0, 1, 2] and moved.importance.shape == (0, 4)
    assert same(replace(moved, labels=None, importance=None), batch(5))
    assert moved.images.data_ptr() != received.images.data_ptr()
    assert moved.ids.untyped_storage().data_ptr() == moved.images.untyped_storage().data_ptr()


def test_batch_bytes_is_enough(manifest: Manifest) -> None:
    """Also with uncropped images, labels, and several crops per image."""
    needs = Needs(noise={"mask": Noise("uniform", (7,))}, labels=True, uncropped_images=80)
    data = DataConfig(shards=str(manifest.folder), image_size=32, workers=0, crops=3)
    loader = TrainLoader(manifest, data, needs, seed=0, global_batch=8, micro_batch=8, rank=0, world=1)
    three = list(islice(loader, 3))
    pool = SharedMemoryPool(1, batch_bytes(32, needs, 8), data.crops)
    assert isinstance(pool.pack(three), PooledItem)


def test_batch_bytes_is_enough_for_small_images(manifest: Manifest) -> None:
    """The other tensors are larger than very small images."""
    data = DataConfig(shards=str(manifest.folder), image_size=8, workers=1, colour_jitter=(0.4, 0.4, 0.4))
    needs = Needs(labels=True, uncropped_images=1024)
    loader = TrainLoader(manifest, data, needs, seed=0, global_batch=1024, micro_batch=1024, rank=0, world=1)
    (made, pool), positions = loader._make_loader(0), np.arange(1024)
    assert pool is not None and isinstance(pool.pack(made.dataset[positions, positions[None]]), PooledItem)


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
def test_the_loader_uses_the_pool(manifest: Manifest) -> None:
    """Nothing is overwritten while it is referenced, though more items are held than there are slots."""
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
