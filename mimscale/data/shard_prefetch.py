"""A process next to the trainer that copies the shards which its rank will read next into the cache of the node.

The order is a pure function, so the next shards are known. Workers never wait for this process: they read from the
original until a shard is in the cache.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from mimscale.data.mixture import AnyOrder, Indexed
from mimscale.data.order import rank_positions

POLL_S = 0.2
STRIDE, HORIZON = 4096, 1 << 17  # samples of this rank: planned at a time, and in all


class ShardPrefetcher:
    """Runs `_prefetch` in a process of its own. The loader must set `step` to the global batch that it reads."""

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
        context = multiprocessing.get_context("spawn")  # this process may have threads
        self.step = context.Value("q", step, lock=False)
        self._process = context.Process(
            target=_prefetch,
            args=(manifest, order, global_batch, rank, world, self.step, os.getpid(), unit),
            daemon=True,
        )
        self._process.start()

    def close(self) -> None:
        self._process.kill()
        self._process.join()


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
    parent: int,
    unit: int,
) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    cache = manifest.cache
    assert cache is not None
    share = cache.limit // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    sizes = [shard.bytes for shard in manifest.shards]
    cache.clean_up()
    warned, planned_at, plan = False, -1, list[int]()
    while os.getppid() == parent:
        if step.value != planned_at:
            planned_at = step.value
            shards = upcoming_shards(manifest, order, global_batch, rank, world, planned_at, unit)
            plan = first_within_budget(shards, sizes, share)
            cache.set_wanted(manifest.shard_key(shard) for shard in plan)
        for shard in plan:
            try:
                manifest.fetch(shard)
            except OSError as error:
                if not warned:
                    print(f"cache: {error}; samples are read from {manifest.location}", file=sys.stderr, flush=True)
                warned = True
            if os.getppid() != parent or step.value > planned_at + 16:
                break
        time.sleep(POLL_S)
