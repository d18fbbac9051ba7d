"""All ranks of a launch train the same: compared after they have met and before the engine is built.

A stale copy of a recipe or of the code on one node, an override typed on one of them, or ranks of two launches that met
would otherwise train something that nobody asked for, or hang in the middle.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimscale.checkpoint import run_folder
from mimscale.distributed.coordination import Coordinator
from mimscale.errors import UserError
from mimscale.teachers.ensemble import TeacherEnsemble
from mimscale.training.checked_run import CheckedRun

PER_RANK = ("data.shards", "data.cache", "data.workers", "data.prefetch", "evals.train", "evals.val")
"""Keys in which nodes may differ: their data is compared by its fingerprint, weights by their sha256."""
SHOWN = 3


def refuse_different_ranks(checked: CheckedRun, teachers: TeacherEnsemble, coordinator: Coordinator) -> None:
    """Raise UserError, on all ranks, that names what differs and both values. Collective."""
    if coordinator.world > 1:
        refuse_different({**identity(checked), **_flat("teachers", teachers.identities())}, coordinator)


def refuse_different(mine: Mapping[str, str], coordinator: Coordinator) -> None:
    """The same for any values. Collective."""
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


def identity(checked: CheckedRun) -> dict[str, str]:
    """What must be the same on every rank, as text: recipe, DeepSpeed's file, data, code, versions, device, folder."""
    recipe = {
        key: repr(value)
        for key, value in checked.config.flat().items()
        if key not in PER_RANK and not key.endswith(".weights")
    }
    return {
        **recipe,
        **_flat("engine.ds_config", checked.ds_config),
        "data": checked.manifest.fingerprint,
        **_evals_data(checked),
        "code": f"{run_folder.head_commit() or 'installed'}, {source_digest()[:12]}",
        "python": platform.python_version(),
        **{name: str(version) for name, version in run_folder.versions().items()},
        "engine.device": checked.world.device.type,
        "--run-dir": str(checked.run_dir),
        "checkpoints to continue from": "none" if checked.fresh else "found",
    }


def _evals_data(checked: CheckedRun) -> dict[str, str]:
    if checked.evals is None:
        return {}
    return {f"evals.{key}": getattr(checked.evals, key).manifest.fingerprint for key in ("train", "val")}


def source_digest() -> str:
    """sha256 over this package's modules, whether they are in a repository, changed, or installed."""
    digest, root = hashlib.sha256(), Path(run_folder.__file__).resolve().parent.parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _flat(prefix: str, values: Any) -> dict[str, str]:
    if isinstance(values, Mapping) and values:
        return {k: v for key, value in values.items() for k, v in _flat(f"{prefix}: {key}", value).items()}
    return {prefix: repr(values)}
