"""All ranks of a launch were given the same: compared after they have met and before they work together.

A stale copy of a recipe, of weights or of the code on one node, an option typed on one of them, or ranks of two
launches that met would otherwise compute something that nobody asked for, or hang in the middle.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from typing import Any

from mimscale.distributed.coordination import Coordinator
from mimscale.errors import UserError

SHOWN = 3


def refuse_different(mine: Mapping[str, str], coordinator: Coordinator) -> None:
    """Raise UserError, on all ranks, that names what differs and both values. Collective."""
    text = json.dumps(mine, sort_keys=True).encode()
    digests = coordinator.gather_bytes(hashlib.sha256(text).digest())
    if len(set(digests)) == 1:
        return
    everyone = coordinator.gather((platform.node(), dict(mine)))
    raise UserError(difference(everyone), everywhere=True)


def difference(everyone: list[tuple[str, dict[str, str]]]) -> str:
    """One line about the first rank that is not as rank 0. everyone: host and values of each rank, in rank order."""
    (host0, first), absent = everyone[0], "absent"
    rank, host, other = next((r, h, values) for r, (h, values) in enumerate(everyone) if values != first)
    keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
    shown = "; ".join(
        f"{key}: {first.get(key, absent)} on rank 0 ({host0}), {other.get(key, absent)} on rank {rank} ({host})"
        for key in keys[:SHOWN]
    )
    more = f"; and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"the ranks of this launch differ: {shown}{more}; give all the same command, recipe, code and data"


def flat(prefix: str, values: Any) -> dict[str, str]:
    """Nested values under names like "prefix: key: key", as `refuse_different` takes them."""
    if isinstance(values, Mapping) and values:
        return {k: v for key, value in values.items() for k, v in flat(f"{prefix}: {key}", value).items()}
    return {prefix: repr(values)}
