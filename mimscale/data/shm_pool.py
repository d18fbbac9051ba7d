"""A pool of shared memory in which the workers of a DataLoader make their batches.

By default torch creates a new shared-memory file per tensor, whose pages the kernel must clear and map one by one: a
tenth of the CPU time per image. Here a worker takes a free slot of a fixed pool, makes its images in it (`images`),
copies all other tensors of its item behind them and sends the number of the slot. In the process that made the pool the
tensors of a batch are views of one piece of the slot, so that `Batch.to` moves it in one copy; on a GPU that process
pins the slots, and the copy needs no other one before it. The slot is free again when the last tensor in it is
garbage-collected. If no slot is free, or the slots are too small, the item is sent by value through a pipe: slower, but
nothing is lost. The memory is anonymous (memfd): a killed run leaves nothing in /dev/shm, and the size limit of
/dev/shm, 64 MiB in many containers, does not apply.
"""

from __future__ import annotations

import io
import itertools
import mmap
import os
import pickle
import struct
import sys
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
from mimscale.types import ALIGNMENT, Batch

_NUMBER = struct.Struct("<I")
_POOLS: weakref.WeakValueDictionary[int, SharedMemoryPool] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


class SharedMemoryPool:
    """`slots` slots for items of at most `batches` batches of `size` bytes each, shared by one process and the workers
    that it starts afterwards.

    The numbers of the free slots are in a pipe: taking one never blocks, and a process that dies loses only the slots
    that it holds. Memory is allocated when a page is first written, or when the pool is pinned.
    """

    def __init__(self, slots: int, size: int, batches: int = 1):
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        total = slots * batches * size
        memory, free = os.memfd_create("mimscale"), os.pipe()
        try:
            os.ftruncate(memory, total)
        except OSError as error:
            for fd in (memory, *free):
                os.close(fd)
            raise UserError(
                f"{total} bytes of shared memory for the data workers: {error.strerror}; raise `ulimit -f`, or lower "
                f"data.workers and data.prefetch"
            ) from None
        os.set_blocking(free[0], False)
        self._open(next(_NUMBERS), slots, size, batches, (memory, *free))
        _POOLS[self.number] = self
        for slot in range(slots):
            self._free_slot(slot)

    def _open(self, number: int, slots: int, size: int, batches: int, fds: Sequence[int]) -> None:
        self.number, self.slots, self.size, self.batches = number, slots, size, batches
        self._memory, self._free_read, self._free_write = self._fds = fds
        self._bytes = _Mapping(self._memory, slots * batches * size)
        self._pid = os.getpid()
        self._reserved: int | None = None  # the slot of the item that this worker makes

    def __reduce__(self) -> tuple[Any, ...]:
        """For spawned workers. Items refer to their pool by its number, so a pool is never pickled otherwise."""
        if get_spawning_popen() is None:
            raise TypeError("a pool can be pickled only to start a worker process")
        fds = [reduction.DupFd(fd) for fd in self._fds]
        return _open_in_worker, (self.number, self.slots, self.size, self.batches, fds)

    def __del__(self) -> None:
        for fd in getattr(self, "_fds", ()):
            os.close(fd)

    def images(self, batches: int, shape: tuple[int, ...]) -> list[NDArray[np.uint8]]:
        """In a worker: uint8 [*shape] for the images of each batch of the item that it is about to make.

        They are in a slot, if one is free and large enough, and `pack` then has nothing to copy.
        """
        if self._reserved is None:  # else an item failed before it was packed
            self._reserved = self._take_slot()
        if self._reserved is None or batches > self.batches or int(np.prod(shape)) > self.size:
            return [np.empty(shape, np.uint8) for _ in range(batches)]
        memory = self.memory(self._reserved)
        return [np.ndarray(shape, np.uint8, memory, number * self.size) for number in range(batches)]

    def pack(self, item: Sequence[Batch]) -> PooledItem | CopiedItem:
        """In a worker: copy the tensors of an item that are not there yet into its slot."""
        slot, self._reserved = self._take_slot() if self._reserved is None else self._reserved, None
        if slot is not None:
            memory, parts = self.memory(slot), list[_Part]()
            try:
                for number, batch in enumerate(item):
                    pickler = _Pickler(memory[number * self.size : (number + 1) * self.size], batch)
                    parts.append(_Part(number * self.size, number * self.size + pickler.end, pickler.file.getvalue()))
                return PooledItem(self.number, slot, parts)
            except _SlotTooSmall:
                self._free_slot(slot)
        return CopiedItem(_pickle_by_value(item))

    def unpack(self, pooled: PooledItem) -> Sequence[Batch]:
        """In the process that made the pool; must be called exactly once per item."""
        memory = self.memory(pooled.slot)
        weakref.finalize(memory, self._on_unused, pooled.slot).atexit = False
        pieces = [torch.from_numpy(memory[part.start : part.end]) for part in pooled.parts]
        return [_Unpickler(part.pickled, piece).load() for part, piece in zip(pooled.parts, pieces, strict=True)]

    def memory(self, slot: int) -> NDArray[np.uint8]:
        """uint8 [batches * size], a view of a slot; every array made from it keeps it alive."""
        size = self.batches * self.size
        return np.frombuffer(self._bytes, np.uint8, size, slot * size)

    def pin(self) -> str | None:
        """Make a GPU read the slots directly, in the process that made the pool. Returns the error, if there is one.

        Workers must have been started before: CUDA may keep memory that it has pinned from a process forked later.
        """
        address, size = np.frombuffer(self._bytes, np.uint8).ctypes.data, len(self._bytes)
        error = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
        if error:
            return f"cudaHostRegister returned {error} for {size >> 20} MiB"
        self._bytes.pinned = address
        return None

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


class _Mapping(mmap.mmap):
    """pinned: the address at which CUDA has pinned this memory, which ends before the memory is unmapped."""

    pinned: int | None = None

    def __del__(self) -> None:
        if self.pinned is not None and not sys.is_finalizing():
            torch.cuda.cudart().cudaHostUnregister(self.pinned)


@dataclass(frozen=True)
class _Part:
    """One batch of an item: its bytes in the slot, and everything else, pickled."""

    start: int
    end: int
    pickled: bytes


@dataclass(frozen=True)
class PooledItem:
    """An item of a loader whose tensors are in a slot."""

    pool: int
    slot: int
    parts: list[_Part]

    def unpack(self) -> Sequence[Batch]:
        return _POOLS[self.pool].unpack(self)


@dataclass(frozen=True)
class CopiedItem:
    """An item of a loader that is sent by value."""

    pickled: bytes

    def unpack(self) -> Sequence[Batch]:
        item: Sequence[Batch] = pickle.loads(self.pickled)
        return item


def unpack(item: PooledItem | CopiedItem | Sequence[Batch]) -> Sequence[Batch]:
    """The item itself, whichever way it was sent."""
    return item.unpack() if isinstance(item, PooledItem | CopiedItem) else item


class _SlotTooSmall(Exception):
    pass


class _Pickler(pickle.Pickler):
    """Pickles a batch with its tensors in `memory`, uint8 [size]; those that are not there yet are copied.

    end: of the bytes in use.
    """

    def __init__(self, memory: NDArray[np.uint8], batch: Batch):
        self.file, self._memory, self._address = io.BytesIO(), memory, memory.ctypes.data
        self.end = batch.images.nbytes if self._is_inside(batch.images) else 0
        super().__init__(self.file, pickle.HIGHEST_PROTOCOL)
        self.dump(batch)

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        if not self._is_inside(value):
            array, start = value.numpy(), -(-self.end // ALIGNMENT) * ALIGNMENT
            if start + array.nbytes > len(self._memory):
                raise _SlotTooSmall
            copied = np.ndarray(array.shape, array.dtype, self._memory, start)
            copied[...] = array
            value, self.end = torch.from_numpy(copied), start + array.nbytes
        offset = (value.data_ptr() - self._address) // value.element_size() if value.numel() else 0
        return value.dtype, offset, tuple(value.shape), value.stride()

    def _is_inside(self, tensor: Tensor) -> bool:
        return 0 <= tensor.data_ptr() - self._address < len(self._memory)


class _Unpickler(pickle.Unpickler):
    """memory: uint8 [end]; all tensors are views of it."""

    def __init__(self, pickled: bytes, memory: Tensor):
        super().__init__(io.BytesIO(pickled))
        self._memory = memory

    def persistent_load(self, layout: Any) -> Tensor:
        dtype, offset, shape, stride = layout
        return torch.empty(0, dtype=dtype).set_(self._memory.untyped_storage(), offset, shape, stride)


class _ValuePickler(pickle.Pickler):
    """Tensors as arrays, because torch's own way would put them into /dev/shm."""

    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, Tensor) else NotImplemented


def _pickle_by_value(item: Sequence[Batch]) -> bytes:
    file = io.BytesIO()
    _ValuePickler(file, 4).dump(item)  # arrays that protocol 5 makes cannot be written to
    return file.getvalue()


def _open_in_worker(number: int, slots: int, size: int, batches: int, fds: list[Any]) -> SharedMemoryPool:
    pool = SharedMemoryPool.__new__(SharedMemoryPool)
    pool._open(number, slots, size, batches, [fd.detach() for fd in fds])
    return pool
