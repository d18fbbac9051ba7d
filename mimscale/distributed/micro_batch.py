"""Global batch -> micro-batch per rank and accumulation steps."""

from __future__ import annotations

from mimscale.errors import UserError


def solve_micro_batch(global_batch: int, world: int, max_micro_batch: int) -> tuple[int, int]:
    """(micro-batch per rank, accumulation steps) with micro x accumulation x world = global_batch, fewest steps.

    Raises UserError with the neighbouring values that would work.
    """
    if global_batch % world:
        below, above = global_batch // world * world, -(-global_batch // world) * world
        worlds = [w for w in range(1, min(2 * world, global_batch + 1)) if global_batch % w == 0]
        nearest = sorted(worlds, key=lambda w: abs(w - world))[:3]
        raise UserError(
            f"schedule.global_batch = {global_batch} does not divide over {world} ranks; "
            f"use {' or '.join(str(b) for b in (below, above) if b)}, or {', '.join(map(str, sorted(nearest)))} ranks"
        )
    per_rank = global_batch // world
    micro = max(size for size in range(1, min(per_rank, max_micro_batch) + 1) if per_rank % size == 0)
    return micro, per_rank // micro
