"""A process beside the trainer that fetches the shards which its rank will read next into the node's cache.

The order is a function, so what comes next is known. Workers never wait for it: until a shard is there they read their
samples from where it lies.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator

import numpy as np

from mimscale.data.manifest import Manifest
from mimscale.data.order import Order, rank_positions

LOOK_S = 0.2
STRIDE, HORIZON = 4096, 1 << 17  # samples of this rank


class ShardPrefetcher:
    """Runs `_keep` in a process of its own. `step` is to be kept at the loader's step."""

    def __init__(self, manifest: Manifest, order: Order, global_batch: int, rank: int, world: int, step: int):
        context = multiprocessing.get_context("spawn")  # this process may have threads
        self.step = context.Value("q", step, lock=False)
        self._process = context.Process(
            target=_keep, args=(manifest, order, global_batch, rank, world, self.step, os.getpid()), daemon=True
        )
        self._process.start()

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def upcoming(manifest: Manifest, order: Order, global_batch: int, rank: int, world: int, step: int) -> Iterator[int]:
    """Shards in the order in which this rank first needs them from `step` on, each once; so far as the horizon."""
    seen: set[int] = set()
    steps = max(1, STRIDE // (global_batch // world))
    for first in range(step, step + max(1, HORIZON // (global_batch // world)), steps):
        positions = np.concatenate([rank_positions(s, global_batch, rank, world) for s in range(first, first + steps)])
        shards, where = np.unique(manifest.locate(order.ids(positions))[0], return_index=True)
        for shard in shards[np.argsort(where)].tolist():
            if shard not in seen:
                seen.add(shard)
                yield shard


def within(shards: Iterator[int], sizes: list[int], budget: int) -> list[int]:
    """As many of the first shards as fit into the budget, in bytes."""
    taken: list[int] = []
    for shard in shards:
        budget -= sizes[shard]
        if budget < 0:
            break
        taken.append(shard)
    return taken


def _keep(manifest: Manifest, order: Order, global_batch: int, rank: int, world: int, step, parent: int) -> None:  # type: ignore[no-untyped-def]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    cache = manifest.cache
    assert cache is not None
    share = cache.limit // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    sizes = [shard.bytes for shard in manifest.file.shards]
    cache.tidy()
    warned, planned_at, plan = False, -1, list[int]()
    while os.getppid() == parent:
        if step.value != planned_at:
            planned_at = step.value
            plan = within(upcoming(manifest, order, global_batch, rank, world, planned_at), sizes, share)
            cache.want(manifest.shard_key(shard) for shard in plan)
        for shard in plan:
            try:
                manifest.fetch(shard)
            except OSError as error:
                if not warned:
                    print(f"cache: {error}; samples are read from {manifest.place}", file=sys.stderr, flush=True)
                warned = True
            if os.getppid() != parent or step.value > planned_at + 16:
                break
        time.sleep(LOOK_S)
