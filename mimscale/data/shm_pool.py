"""How batches come from the workers: in shared memory that is used again and again.

torch's own way makes a new shared file per tensor, whose pages the kernel clears and hands out one by one: a tenth of
all the work on a picture. Here a worker takes a free slot, lays all tensors of its item into it and sends the slot's
number; the slot is free again when the last tensor over it is gone. Where no slot is free, or one is too small, the
item goes torch's way. The memory has no name: a killed run leaves nothing in /dev/shm, and its limit does not matter.
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

from mimscale.types import Batch

KEPT_BYTES = 1 << 20  # smaller tensors are copied out, so that whoever keeps a batch's ids does not keep its slot
_ALIGNED = 64
_NUMBER = struct.Struct("<I")
_POOLS: weakref.WeakValueDictionary[int, SharedMemoryPool] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


class SharedMemoryPool:
    """slots of `size` bytes each, for one process and the workers that it starts afterwards.

    Free slots are numbers in a pipe: taking one never waits, and who dies takes nothing along but what it holds. Pages
    come into being when they are first written.
    """

    def __init__(self, slots: int, size: int):
        self.number, self.slots, self.size = next(_NUMBERS), slots, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        memory, free = os.memfd_create("mimscale"), os.pipe()
        os.ftruncate(memory, self.slots * self.size)
        os.set_blocking(free[0], False)
        self._open(memory, *free)
        _POOLS[self.number] = self
        for slot in range(slots):
            self._give(slot)

    def _open(self, *fds: int) -> None:
        self._memory, self._take, self._free = self._fds = fds
        self._bytes = mmap.mmap(self._memory, self.slots * self.size)
        self._owner = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        """For a worker that is not forked; everywhere else only the number travels."""
        if get_spawning_popen() is None:
            raise TypeError("a pool goes to workers only while they start")
        return _reopened, (self.number, self.slots, self.size, [reduction.DupFd(fd) for fd in self._fds])

    def __del__(self) -> None:
        for fd in getattr(self, "_fds", ()):
            os.close(fd)

    def pack(self, item: Sequence[Batch]) -> PooledItem | Sequence[Batch]:
        """In a worker: the item laid into a slot, or as it is."""
        slot = self._taken()
        if slot is None:
            return item
        packer = _Packer(self.room(slot))
        try:
            packer.dump(item)
        except _Full:
            self._give(slot)
            return item
        return PooledItem(self.number, slot, packer.file.getvalue())

    def unpack(self, pooled: PooledItem) -> Sequence[Batch]:
        """In the process that made the pool, once per pooled."""
        room = self.room(pooled.slot)
        weakref.finalize(room, self._returned, pooled.slot).atexit = False
        item: Sequence[Batch] = _Unpacker(pooled.content, room).load()
        return item

    def room(self, slot: int) -> NDArray[np.uint8]:
        """[size] over a slot; every array made from it keeps it alive."""
        return np.frombuffer(self._bytes, np.uint8, self.size, slot * self.size)

    def _taken(self) -> int | None:
        try:
            return int(_NUMBER.unpack(os.read(self._take, _NUMBER.size))[0])
        except BlockingIOError:
            return None

    def _give(self, slot: int) -> None:
        os.write(self._free, _NUMBER.pack(slot))

    def _returned(self, slot: int) -> None:
        if os.getpid() == self._owner:  # a forked process drops its copy of a batch, and the batch lives on
            self._give(slot)


@dataclass(frozen=True)
class PooledItem:
    """An item of a loader whose tensors lie in a slot."""

    pool: int
    slot: int
    content: bytes

    def open(self) -> Sequence[Batch]:
        return _POOLS[self.pool].unpack(self)

    def pin_memory(self) -> Sequence[Batch]:
        """Called by torch's DataLoader when it pins."""
        return [batch.pin_memory() for batch in self.open()]


def opened(item: PooledItem | Sequence[Batch]) -> Sequence[Batch]:
    return item.open() if isinstance(item, PooledItem) else item


class _Full(Exception):
    """The slot is too small."""


class _Packer(pickle.Pickler):
    """Everything but tensors goes into the pickle; these leave their place, type and shape there."""

    def __init__(self, room: NDArray[np.uint8]):
        self.file, self._room, self._end = io.BytesIO(), room, 0
        super().__init__(self.file, pickle.HIGHEST_PROTOCOL)

    def persistent_id(self, thing: Any) -> Any:
        if not isinstance(thing, Tensor):
            return None
        array, start = thing.numpy(), self._end
        if start + array.nbytes > len(self._room):
            raise _Full
        place = (start, array.dtype.str, array.shape)
        _laid(self._room, place)[...] = array
        self._end = -(-(start + array.nbytes) // _ALIGNED) * _ALIGNED
        return place


class _Unpacker(pickle.Unpickler):
    def __init__(self, content: bytes, room: NDArray[np.uint8]):
        super().__init__(io.BytesIO(content))
        self._room = room

    def persistent_load(self, place: Any) -> Tensor:
        array = _laid(self._room, place)
        return torch.from_numpy(array if array.nbytes >= KEPT_BYTES else array.copy())


def _laid(room: NDArray[np.uint8], place: tuple[int, str, tuple[int, ...]]) -> NDArray[Any]:
    start, kind, shape = place
    return np.ndarray(shape, kind, room, start)


def _reopened(number: int, slots: int, size: int, fds: list[Any]) -> SharedMemoryPool:
    pool = SharedMemoryPool.__new__(SharedMemoryPool)
    pool.number, pool.slots, pool.size = number, slots, size
    pool._open(*(fd.detach() for fd in fds))
    return pool
