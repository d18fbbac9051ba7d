"""A process next to the trainer that copies the shards which its rank will read next into the cache of the node.

The order is a pure function, so the next shards are known. Workers never wait for this process: they read from the
original until a shard is in the cache.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import numpy as np

from mimscale.data.mixture import AnyOrder, Indexed
from mimscale.data.order import rank_positions
from mimscale.errors import warn

POLL_S = 0.2
START_S, STARTS = 120.0, 4
"""Seconds in which the process must have begun, imports included, and how often it is started."""
STRIDE, HORIZON = 4096, 1 << 17  # samples of this rank: planned at a time, and in all


class ShardPrefetcher:
    """Runs `_prefetch` in a process of its own. The loader must call `advance` at every step.

    The process is spawned, which runs a new program: unlike a fork it cannot inherit a lock that another thread holds.
    One that has not begun after START_S, or that has ended, is started again, STARTS times in all; the run goes on
    without it afterwards. step: the global batch to begin at.
    """

    def __init__(
        self,
        manifest: Indexed,
        order: AnyOrder,
        global_batch: int,
        rank: int,
        world: int,
        step: int,
        unit: int = 1,
    ):
        context = multiprocessing.get_context("spawn")
        self._step = context.Value("q", step, lock=False)
        self._begun = context.Value("b", 0, lock=False)
        arguments = (manifest, order, global_batch, rank, world, self._step, self._begun, os.getpid(), unit)
        self._make_process = partial(context.Process, target=_prefetch, args=arguments, daemon=True)
        self._starts, self._process = 0, cast(Any, None)
        self._start()

    @property
    def pid(self) -> int | None:
        """Of the process; None after it was given up."""
        return None if self._process is None else self._process.pid

    def advance(self, step: int) -> None:
        """The trainer has come to global batch `step`."""
        self._step.value = step
        if self._process is None:
            return
        ended = not self._process.is_alive()
        if not ended and (self._begun.value or time.monotonic() < self._deadline_s):
            return
        what = "has ended" if ended else f"did not begin within {START_S:g} s"
        self.close()
        if self._starts < STARTS:
            warn(f"cache: the process that copies shards ahead {what}; it is started again")
            self._start()
        else:
            warn(f"cache: the process that copies shards ahead {what}, {STARTS} times; samples are read without it")

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        self._starts, self._begun.value = self._starts + 1, 0
        self._deadline_s = time.monotonic() + START_S
        self._process = self._make_process()
        self._process.start()


def upcoming_shards(
    manifest: Indexed, order: AnyOrder, global_batch: int, rank: int, world: int, step: int, unit: int = 1
) -> Iterator[int]:
    """Shards in the order in which this rank first needs them from `step` on, each once, for HORIZON samples."""
    seen: set[int] = set()
    steps = max(1, STRIDE // (global_batch // world))
    for first in range(step, step + max(1, HORIZON // (global_batch // world)), steps):
        steps_taken = range(first, first + steps)
        positions = np.concatenate([rank_positions(s, global_batch, rank, world, unit) for s in steps_taken])
        shards, where = np.unique(manifest.locate(order.ids(positions))[0], return_index=True)
        for shard in shards[np.argsort(where)].tolist():
            if shard not in seen:
                seen.add(shard)
                yield shard


def first_within_budget(shards: Iterator[int], sizes: list[int], budget: int) -> list[int]:
    """The longest prefix of `shards` whose sizes sum to at most the budget, in bytes."""
    prefix: list[int] = []
    for shard in shards:
        budget -= sizes[shard]
        if budget < 0:
            break
        prefix.append(shard)
    return prefix


def _prefetch(
    manifest: Indexed,
    order: AnyOrder,
    global_batch: int,
    rank: int,
    world: int,
    step: Any,
    begun: Any,
    parent: int,
    unit: int,
) -> None:
    begun.value = 1
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    cache = manifest.cache
    assert cache is not None
    share = cache.limit // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    sizes = [shard.bytes for shard in manifest.shards]
    warned, planned_at, plan = False, -1, list[int]()
    while os.getppid() == parent:
        try:
            if planned_at < 0:
                cache.clean_up()
            if step.value != planned_at:
                planned_at = step.value
                shards = upcoming_shards(manifest, order, global_batch, rank, world, planned_at, unit)
                plan = first_within_budget(shards, sizes, share)
                cache.set_wanted(manifest.shard_key(shard) for shard in plan)
        except OSError as error:  # of a cache that is gone or full
            warned = _warn_once(warned, error, manifest)
        for shard in plan:
            try:
                manifest.fetch(shard)
            except OSError as error:
                warned = _warn_once(warned, error, manifest)
            if os.getppid() != parent or step.value > planned_at + 16:
                break
        time.sleep(POLL_S)


def _warn_once(warned: bool, error: OSError, manifest: Indexed) -> bool:
    if not warned:
        warn(f"cache: {error}; samples are read from {manifest.location}")
    return True
