"""The order of samples at scale: time to find a position, memory, and number of shards that a node reads"""

from __future__ import annotations

import argparse
import resource
import time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--ranks-per-node", type=int, default=8)
    parser.add_argument("--samples", type=float, default=400e6)
    parser.add_argument("--shard-samples", type=int, default=2500)
    parser.add_argument("--global-batch", type=int, default=16384)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--block", type=int, default=8192)


def run(args: argparse.Namespace) -> int:
    """One process computes the positions of single ranks, which do not depend on other ranks."""
    import numpy as np

    from mimscale.bench import _report
    from mimscale.data.order import Order, rank_positions

    shards = max(1, round(args.samples / args.shard_samples))
    counts = np.full(shards, args.shard_samples, dtype=np.int64)
    before = _resident_mib()
    order = Order(counts, seed=0, streams=args.streams, block=args.block)
    steps = order.samples // args.global_batch
    rng = np.random.default_rng(0)

    def positions(step: int, rank: int) -> np.ndarray:
        return rank_positions(step, args.global_batch, rank, args.ranks)

    seeks_ms, next_us = [], []
    for _ in range(5):
        step, rank = int(rng.integers(10 * steps)), int(rng.integers(args.ranks))
        fresh = Order(counts, seed=0, streams=args.streams, block=args.block)
        start_s = time.process_time()
        fresh.ids(positions(step, rank))
        seeks_ms.append(1e3 * (time.process_time() - start_s))
        start_s = time.process_time()
        for later in range(1, 65):
            fresh.ids(positions(step + later, rank))
        next_us.append(1e6 * (time.process_time() - start_s) / (64 * len(positions(step, rank))))
    grown = _resident_mib() - before

    node = range(args.ranks_per_node)
    streams = np.unique(np.concatenate([positions(0, rank) for rank in node]) % order.streams)
    in_epoch = len(np.unique(np.concatenate([order.stream_shards(0, int(stream)) for stream in streams])))
    window = np.concatenate([positions(step, rank) for step in range(8) for rank in node])
    in_8_steps = len(np.unique(order.ids(window) // args.shard_samples))
    wrong = sum(
        not np.array_equal(np.sort(order.ids(np.arange(s * args.global_batch, (s + 1) * args.global_batch))), everyone)
        for s in (0, steps // 2)
        for everyone in [np.sort(np.concatenate([order.ids(positions(s, r)) for r in range(args.ranks)]))]
    )
    rows = [
        ["samples in shards", f"{order.samples:,} in {shards:,}"],
        [
            "first batch of a rank after a resume, CPU ms (median, maximum)",
            f"{np.median(seeks_ms):.0f}, {max(seeks_ms):.0f}",
        ],
        ["every later position, CPU us", f"{np.median(next_us):.1f}"],
        ["memory of the order in a process, MiB", f"{grown:.0f}"],
        ["streams that a node reads", f"{len(streams)} of {order.streams}"],
        ["shards that a node reads in an epoch", f"{in_epoch:,} of {shards:,} ({100 * in_epoch / shards:.2f} %)"],
        ["shards that a node reads in 8 steps", f"{in_8_steps:,}"],
        ["global batches that the ranks together do not fill exactly", f"{wrong} of 2"],
    ]
    _report.publish(args, [([f"{args.ranks:,} ranks, {args.ranks_per_node} per node", ""], rows)])
    return 1 if wrong else 0


def _resident_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
