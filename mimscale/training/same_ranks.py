"""What must be the same on all ranks of a training: compared before the engine is built."""

from __future__ import annotations

from mimscale.checkpoint import run_folder
from mimscale.distributed.coordination import Coordinator
from mimscale.distributed.same_ranks import flat, refuse_different
from mimscale.teachers.ensemble import TeacherEnsemble
from mimscale.training.checked_run import CheckedRun

PER_RANK = ("data.shards", "data.cache", "data.workers", "data.prefetch", "evals.train", "evals.val")
"""Keys in which nodes may differ: their data is compared by its fingerprint, weights by their sha256."""


def refuse_different_ranks(checked: CheckedRun, teachers: TeacherEnsemble, coordinator: Coordinator) -> None:
    """Raise UserError, on all ranks, that names what differs and both values. Collective."""
    if coordinator.world > 1:
        refuse_different({**identity(checked), **flat("teachers", teachers.identities())}, coordinator)


def identity(checked: CheckedRun) -> dict[str, str]:
    """What must be the same on every rank, as text: recipe, DeepSpeed's file, data, code, versions, device, folder."""
    recipe = {
        key: repr(value)
        for key, value in checked.config.flat().items()
        if key not in PER_RANK and not key.endswith(".weights")
    }
    return {
        **recipe,
        **flat("engine.ds_config", checked.ds_config),
        "data": checked.manifest.fingerprint,
        **_evals_data(checked),
        **run_folder.code(),
        "engine.device": checked.world.device.type,
        "--run-dir": str(checked.run_dir),
        "checkpoints to continue from": "none" if checked.fresh else "found",
    }


def _evals_data(checked: CheckedRun) -> dict[str, str]:
    if checked.evals is None:
        return {}
    return {f"evals.{key}": getattr(checked.evals, key).manifest.fingerprint for key in ("train", "val")}
