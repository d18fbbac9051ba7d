"""Host-side agreement between ranks, on a gloo group of its own: never waits for the accelerator.

Flags, error texts and barriers go through here; tensors of the training never do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from mimscale.errors import UserError

T = TypeVar("T")
OPENS_S, GONE_S = 5.0, 16.0  # between the signs of life of ranks that open the process group; without one


class Waits(Protocol):
    """What a thread that watches a rank asks of it. world: number of ranks.

    waiting: number, name and start (on the monotonic clock) of the call in which this rank waits for others.
    """

    world: int
    waiting: tuple[int, str, float] | None

    def absent(self) -> list[int]:
        """Ranks that do not take part in this call, as far as this rank knows. For the thread that watches."""


class Opening:
    """In the place of the `Coordinator` while the process group is opened, in calls that say nothing of the others.

    A rank that was killed after all had met would leave them there until the group's timeout. Each gives a sign of
    life in the store; rank 0, which serves it, reads them.
    """

    def __init__(self, store: dist.Store | None, rank: int, world: int) -> None:
        now_s = time.monotonic()
        self._store, self._rank, self.world = store, rank, world
        self.waiting: tuple[int, str, float] | None = (0, "open_process_group", now_s) if world > 1 else None
        self._next_s = 0.0
        others = range(1, world) if rank == 0 else ()
        self._signs, self._seen_s = dict.fromkeys(others, 0), dict.fromkeys(others, now_s)

    def absent(self) -> list[int]:
        now_s = time.monotonic()
        if self._store is not None and now_s >= self._next_s:
            self._next_s = now_s + OPENS_S
            self._store.add(f"opens/{self._rank}", 1)
            for rank, known in self._signs.items():
                signs = self._store.add(f"opens/{rank}", 0)
                if signs != known:
                    self._signs[rank], self._seen_s[rank] = signs, now_s
        return [rank for rank, seen_s in self._seen_s.items() if now_s - seen_s > GONE_S]


class Coordinator:
    """The control plane of a run. Without an initialised process group it is that of a single rank.

    store: in which ranks that wait leave a note, so that `absent` knows for whom. waiting: see `Waits`.
    """

    def __init__(self, store: dist.Store | None = None, timeout_s: float = 1800.0) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self._group: Any = None
        if self.world > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._pending: tuple[torch.Tensor, Any] | None = None
        self._calls = 0
        self._store, self._noted = store, 0
        self.waiting: tuple[int, str, float] | None = None
        self.last = "none"  # for whoever asks where this rank stands

    def gather(self, item: T) -> list[T]:
        """The item of every rank, in rank order, on every rank."""
        with self._call("gather"):
            if self.world == 1:
                return [item]
            items: list[Any] = [None] * self.world
            dist.all_gather_object(items, item, group=self._group)
            return items

    def broadcast(self, item: T) -> T:
        """Rank 0's item, on every rank."""
        with self._call("broadcast"):
            if self.world == 1:
                return item
            items = [item]
            dist.broadcast_object_list(items, src=0, group=self._group)
            return items[0]

    def gather_bytes(self, item: bytes) -> list[bytes]:
        """As `gather` for items of one length on all ranks, without pickling."""
        with self._call("gather_bytes"):
            if self.world == 1:
                return [item]
            mine = torch.frombuffer(bytearray(item), dtype=torch.uint8)
            items = [torch.empty_like(mine) for _ in range(self.world)]
            dist.all_gather(items, mine, group=self._group)
            return [bytes(each.numpy()) for each in items]

    def barrier(self) -> None:
        with self._call("barrier"):
            if self.world > 1:
                dist.barrier(group=self._group)

    def on_all_ranks(self, work: Callable[..., T], *args: Any) -> T:
        """Run `work`, which must not communicate, on every rank; if it fails on any, raise on all with the texts.

        Without this a rank that fails alone would leave the others waiting in their next collective. Bad input is a
        UserError on all of them.
        """
        result: T | None = None
        failure: Exception | None = None
        try:
            result = work(*args)
        except Exception as error:
            failure = error
        bad_input = isinstance(failure, UserError)
        name = "" if bad_input else f"{type(failure).__name__}: "
        texts = self.gather(None if failure is None else (bad_input, f"rank {self.rank}: {name}{failure}"))
        failed = [text for text in texts if text]
        if failed and all(of_user for of_user, _ in failed):
            if isinstance(failure, UserError) and (self.world == 1 or len(failed) == self.world):
                failure.everywhere = True
                raise failure
            raise UserError("; ".join(text for _, text in failed[:3]), everywhere=True) from None
        if failure is not None and (self.world == 1 or len(failed) == self.world):
            raise failure
        if failed:
            raise RuntimeError("; ".join(text for _, text in failed[:3])) from failure
        return result  # type: ignore[return-value]

    def on_rank0(self, work: Callable[..., T], *args: Any) -> T:
        """Run `work` on rank 0 only and give its result to all; if it fails there, raise on all. The others wait."""
        result: T | None = None
        failure: Exception | None = None
        if self.rank == 0:
            try:
                result = work(*args)
            except Exception as error:
                failure = error
        bad_input = isinstance(failure, UserError)
        text = None if failure is None else f"rank 0: {type(failure).__name__}: {failure}"
        result, bad_input, text = self.broadcast((result, bad_input, text))
        if isinstance(failure, UserError):
            failure.everywhere = True
        if failure is not None:
            raise failure
        if text is not None:
            raise UserError(text, everywhere=True) if bad_input else RuntimeError(text)
        return result  # type: ignore[return-value]

    def agree(self, *numbers: int) -> list[int]:
        """The largest of each number over the ranks, as they were at the PREVIOUS call; at first all of them 0.

        The reduction started here runs beside the step and is read at the next call, so no rank waits for it.
        """
        self._called("agree")
        if self.world == 1:
            return [int(number) for number in numbers]
        answer = self.finish_pending() or [0] * len(numbers)
        tensor = torch.tensor(numbers, dtype=torch.int64)
        self._pending = (tensor, dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group, async_op=True))
        return answer

    def finish_pending(self) -> list[int] | None:
        """Wait for the reduction under way, if any, and return its answer."""
        if self._pending is None:
            return None
        tensor, work = self._pending
        self._pending = None
        with self._waiting("agree"):
            work.wait()
        return tensor.tolist()

    def absent(self) -> list[int]:
        """Ranks that have left no note in the call in which this rank waits; leaves one. For the thread that watches.

        Where there is no store, all others.
        """
        waiting = self.waiting
        if waiting is None:
            return []
        number = waiting[0]
        if self._store is None:
            return [rank for rank in range(self.world) if rank != self.rank]
        if self._noted != number:
            self._store.set(f"waits/{number}/{self.rank}", "1")
            self._noted = number
        return [rank for rank in range(self.world) if not self._store.check([f"waits/{number}/{rank}"])]

    def _called(self, name: str) -> None:
        self._calls += 1
        self.last = f"{name} (number {self._calls})"

    @contextmanager
    def _call(self, name: str) -> Iterator[None]:
        self._called(name)
        with self._waiting(name):
            yield

    @contextmanager
    def _waiting(self, name: str) -> Iterator[None]:
        self.waiting = (self._calls, name, time.monotonic()) if self.world > 1 else None
        try:
            yield
        finally:
            self.waiting = None
