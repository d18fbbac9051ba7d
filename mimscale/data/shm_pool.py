"""A pool of shared memory in which the workers of a DataLoader send their batches.

By default torch creates a new shared-memory file per tensor, whose pages the kernel must clear and map one by one: a
tenth of the CPU time per image. Here a worker takes a free slot of a fixed pool, copies all tensors of its item into it
and sends the number of the slot. The slot is free again when the last tensor in it is garbage-collected. If no slot is
free, or the slots are too small, the item is sent in torch's way. The memory is anonymous (memfd): a killed run leaves
nothing in /dev/shm, and the size limit of /dev/shm does not apply.
"""

from __future__ import annotations

import io
import itertools
import mmap
import os
import pickle
import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimscale.errors import UserError
from mimscale.types import Batch

MIN_VIEW_BYTES = (
    1 << 20
)  # smaller tensors are copied out of the slot, so that keeping the ids of a batch does not keep its slot
_ALIGNMENT = 64
_NUMBER = struct.Struct("<I")
_POOLS: weakref.WeakValueDictionary[int, SharedMemoryPool] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


class SharedMemoryPool:
    """`slots` slots of `size` bytes each, shared by one process and the workers that it starts afterwards.

    The numbers of the free slots are in a pipe: taking one never blocks, and a process that dies loses only the slots
    that it holds. Memory is allocated when a page is first written.
    """

    def __init__(self, slots: int, size: int):
        self.number, self.slots, self.size = next(_NUMBERS), slots, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        memory, free = os.memfd_create("mimscale"), os.pipe()
        try:
            os.ftruncate(memory, self.slots * self.size)
        except OSError as error:
            for fd in (memory, *free):
                os.close(fd)
            raise UserError(
                f"{self.slots * self.size} bytes of shared memory for the data workers: {error.strerror}; raise "
                f"`ulimit -f`, or lower data.workers and data.prefetch"
            ) from None
        os.set_blocking(free[0], False)
        self._open(memory, *free)
        _POOLS[self.number] = self
        for slot in range(slots):
            self._free_slot(slot)

    def _open(self, *fds: int) -> None:
        self._memory, self._free_read, self._free_write = self._fds = fds
        self._bytes = mmap.mmap(self._memory, self.slots * self.size)
        self._pid = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        """For spawned workers. Items refer to their pool by its number, so a pool is never pickled otherwise."""
        if get_spawning_popen() is None:
            raise TypeError("a pool can be pickled only to start a worker process")
        return _open_in_worker, (self.number, self.slots, self.size, [reduction.DupFd(fd) for fd in self._fds])

    def __del__(self) -> None:
        for fd in getattr(self, "_fds", ()):
            os.close(fd)

    def pack(self, item: Sequence[Batch]) -> PooledItem | Sequence[Batch]:
        """In a worker: copy the tensors of an item into a free slot. Returns the item itself if that is impossible."""
        slot = self._take_slot()
        if slot is None:
            return item
        pickler = _Pickler(self.memory(slot))
        try:
            pickler.dump(item)
        except _SlotTooSmall:
            self._free_slot(slot)
            return item
        return PooledItem(self.number, slot, pickler.file.getvalue())

    def unpack(self, pooled: PooledItem) -> Sequence[Batch]:
        """In the process that made the pool; must be called exactly once per item."""
        memory = self.memory(pooled.slot)
        weakref.finalize(memory, self._on_unused, pooled.slot).atexit = False
        item: Sequence[Batch] = _Unpickler(pooled.pickled, memory).load()
        return item

    def memory(self, slot: int) -> NDArray[np.uint8]:
        """uint8 [size], a view of a slot; every array made from it keeps it alive."""
        return np.frombuffer(self._bytes, np.uint8, self.size, slot * self.size)

    def _take_slot(self) -> int | None:
        try:
            return int(_NUMBER.unpack(os.read(self._free_read, _NUMBER.size))[0])
        except BlockingIOError:
            return None

    def _free_slot(self, slot: int) -> None:
        os.write(self._free_write, _NUMBER.pack(slot))

    def _on_unused(self, slot: int) -> None:
        if os.getpid() == self._pid:  # not in a forked child that drops its copy of a batch: the parent still has it
            self._free_slot(slot)


@dataclass(frozen=True)
class PooledItem:
    """An item of a loader whose tensors are in a slot. pickled: everything else."""

    pool: int
    slot: int
    pickled: bytes

    def unpack(self) -> Sequence[Batch]:
        return _POOLS[self.pool].unpack(self)

    def pin_memory(self) -> Sequence[Batch]:
        """Called by torch's DataLoader when it pins."""
        return [batch.pin_memory() for batch in self.unpack()]


def unpack(item: PooledItem | Sequence[Batch]) -> Sequence[Batch]:
    """The item itself, whichever way it was sent."""
    return item.unpack() if isinstance(item, PooledItem) else item


class _SlotTooSmall(Exception):
    pass


class _Pickler(pickle.Pickler):
    """Copies tensors into the slot; the pickle holds their offset, dtype and shape, and everything else."""

    def __init__(self, memory: NDArray[np.uint8]):
        self.file, self._memory, self._end = io.BytesIO(), memory, 0
        super().__init__(self.file, pickle.HIGHEST_PROTOCOL)

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        array, start = value.numpy(), self._end
        if start + array.nbytes > len(self._memory):
            raise _SlotTooSmall
        layout = (start, array.dtype.str, array.shape)
        _array_at(self._memory, layout)[...] = array
        self._end = -(-(start + array.nbytes) // _ALIGNMENT) * _ALIGNMENT
        return layout


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: bytes, memory: NDArray[np.uint8]):
        super().__init__(io.BytesIO(pickled))
        self._memory = memory

    def persistent_load(self, layout: Any) -> Tensor:
        array = _array_at(self._memory, layout)
        return torch.from_numpy(array if array.nbytes >= MIN_VIEW_BYTES else array.copy())


def _array_at(memory: NDArray[np.uint8], layout: tuple[int, str, tuple[int, ...]]) -> NDArray[Any]:
    start, dtype, shape = layout
    return np.ndarray(shape, dtype, memory, start)


def _open_in_worker(number: int, slots: int, size: int, fds: list[Any]) -> SharedMemoryPool:
    pool = SharedMemoryPool.__new__(SharedMemoryPool)
    pool.number, pool.slots, pool.size = number, slots, size
    pool._open(*(fd.detach() for fd in fds))
    return pool
