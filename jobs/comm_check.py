"""Timed all-reduces inside and between nodes, to find slow nodes. One process per rank (COMM_CHECK=1).

Between nodes: in each of a few rounds the nodes are paired, and all ranks of a pair reduce together. The time of a node
is that of its BEST pair, because a healthy node with a slow partner in one round has a healthy partner in another.
Inside a node: its ranks alone. A node is bad if its time exceeds COMM_CHECK_FACTOR (2) x the lower median over the
nodes. Two nodes form a single pair, so a slow link between two nodes is in the table, but neither is called bad.

COMM_CHECK_MB: size of the reduced buffer, default 64 on GPUs, 1 on CPUs.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

ROUNDS, REPEATS = 4, 5


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Up to ROUNDS rounds of disjoint pairs of nodes, no pair twice (circle method)."""
    ring: list[int | None] = [*range(nodes), *([None] if nodes % 2 else [])]
    plan = []
    for _ in range(min(ROUNDS, len(ring) - 1)):
        opposite = zip(ring[: len(ring) // 2], reversed(ring[len(ring) // 2 :]), strict=True)
        plan.append([(min(a, b), max(a, b)) for a, b in opposite if a is not None and b is not None])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return plan


def slow_nodes(seconds: Mapping[str, float], factor: float) -> dict[str, str]:
    """Nodes whose time exceeds factor x the lower median, each with the reason."""
    if not seconds:
        return {}
    median_s = statistics.median_low(seconds.values())
    return {
        node: f"{own_s * 1e3:.1f} ms, the median node takes {median_s * 1e3:.1f} ms"
        for node, own_s in seconds.items()
        if own_s > factor * median_s
    }


def all_reduce_s(ranks: Iterable[int], buffer: torch.Tensor) -> float | None:
    """Median seconds of an all-reduce among `ranks`; None for other processes."""
    members = sorted(ranks)
    if dist.get_rank() not in members:
        return None
    group = dist.new_group(members, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    seconds = []
    for repeat in range(REPEATS + 1):
        dist.barrier(group=group)
        start_s = time.perf_counter()
        dist.all_reduce(buffer, group=group)
        if buffer.is_cuda:
            torch.cuda.synchronize()
        if repeat:  # the first one opens the connections
            seconds.append(time.perf_counter() - start_s)
    return statistics.median(seconds)


def main() -> None:
    cuda = torch.cuda.is_available()
    local, per_node = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=5))
    rank, world = dist.get_rank(), dist.get_world_size()
    nodes, me = world // per_node, rank // per_node
    megabytes = int(os.environ.get("COMM_CHECK_MB", "64" if cuda else "1"))
    buffer = torch.zeros(megabytes << 18, device=device)  # float32

    def ranks_of(node: int) -> range:
        return range(node * per_node, (node + 1) * per_node)

    inside = all_reduce_s(ranks_of(me), buffer) if per_node > 1 else None
    pairs = []
    for pairing in rounds(nodes):
        for a, b in pairing:
            if me in (a, b) and (time_s := all_reduce_s([*ranks_of(a), *ranks_of(b)], buffer)) is not None:
                pairs.append(time_s)
        dist.barrier()

    mine = (os.environ.get("SLURMD_NODENAME", f"node{me}"), inside, min(pairs, default=None))
    gathered: list[tuple[str, float | None, float | None]] = [mine] * world
    dist.all_gather_object(gathered, mine)
    if rank == 0:
        report(gathered[::per_node], megabytes, float(os.environ.get("COMM_CHECK_FACTOR", "2")))
    dist.barrier()
    dist.destroy_process_group()


def report(table: list[tuple[str, float | None, float | None]], megabytes: int, factor: float) -> None:
    """table: (node, seconds inside, seconds of the best pair)."""
    print(f"all-reduce of {megabytes} MiB, ms: node, inside, best pair")
    for node, inside, best in table:
        print(f"  {node} {' '.join('-' if t is None else f'{t * 1e3:.1f}' for t in (inside, best))}")
    alone = {node: inside for node, inside, _ in table if inside is not None}
    paired = {node: best for node, _, best in table if best is not None}
    for where, seconds in (("inside the node", alone), ("with its best partner", paired)):
        for node, why in slow_nodes(seconds, factor).items():
            print(f"BAD NODE {node}: all-reduce {where} takes {why}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
