"""Resuming: continue from the newest checkpoint that is whole, else from a fork's parent, else from the beginning.

The checkpoint format knows neither methods nor data; here it meets the run. All functions that take a `TrainContext`
are collective.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mimscale.checkpoint import format as checkpoint
from mimscale.distributed.coordination import Coordinator
from mimscale.errors import UserError, warn
from mimscale.teachers.ensemble import TeacherEnsemble
from mimscale.training.checked_run import CheckedRun
from mimscale.training.context import TrainContext
from mimscale.training.state import TrainState

T = TypeVar("T")
MANIFEST = {"step", "state", "config", "data", "teachers", "method", "shapes", "groups", "engine"}
"""What `describe_state` writes; a manifest without it is somebody else's."""


def describe_state(run: TrainContext, state: TrainState) -> dict[str, Any]:
    """What a checkpoint's manifest says besides where the tensors are."""
    return {
        "step": state.step,
        "state": state.dump(),
        "config": run.checked.config.dump(),
        "data": run.checked.manifest.fingerprint,
        "teachers": run.teachers.identities(),
        "method": run.method.extra_state(),
        **run.engine.describe(),
    }


def restore(run: TrainContext) -> TrainState:
    """Continue from the newest checkpoint that is whole, else from a fork's parent, else from the beginning.

    Raises UserError, also for what the file system refuses to read.
    """
    try:
        return _restore(run)
    except OSError as error:
        what, why = error.filename or run.checkpoints, error.strerror or error
        raise UserError(f"{what} cannot be read ({why}); repair it, or move it away") from None


def _restore(run: TrainContext) -> TrainState:
    state = load_newest(run, done=run.startup.end)
    if state is not None:
        return state
    if run.coordinator.on_rank0(lambda root: checkpoint.steps(root) or checkpoint.damaged(root), run.checkpoints):
        raise UserError(
            f"every checkpoint in {run.checkpoints} is damaged; remove the damaged-* folders to start at step 0"
        )
    if run.coordinator.rank == 0 and run.checked.parent is None and saved_before(run.checked.run_dir):
        warn(f"{run.checkpoints} has no checkpoint, although metrics.jsonl lists some that were saved; starting at 0")
    if run.checked.parent is not None:
        reader, damage = opened(run.checked.parent, run.coordinator, run.startup.end)
        if reader is None:
            raise UserError(f"--fork: {damage}; start again to take what is now the newest checkpoint of that run")
        run.coordinator.on_all_ranks(run.engine.load_weights, reader)
        run.engine.finish_load(reader, counters=False)
    return TrainState()


def saved_before(run_dir: Path) -> bool:
    """Whether the run's log speaks of a checkpoint."""
    try:
        return b'"event": "saved"' in (run_dir / "metrics.jsonl").read_bytes()
    except OSError:
        return False


def load_newest(
    run: TrainContext, until: float = math.inf, done: Callable[[str], None] = lambda phase: None
) -> TrainState | None:
    """Load the newest whole checkpoint up to step `until`; say why newer ones are passed over, and set them aside.

    done: told of each phase when it ends.
    """
    coordinator = run.coordinator
    for path in reversed(coordinator.on_rank0(checkpoint.steps, run.checkpoints)):
        if checkpoint.step_of(path) > until:
            continue
        reader, damage = opened(path, coordinator, done)
        if reader is not None and (missing := sorted(MANIFEST - reader.meta.keys())):
            reader, damage = None, f"its manifest has no {missing[0]}"
        if reader is None:
            if coordinator.rank == 0:
                warn(f"passing over {path.name}: {damage}")
            coordinator.on_rank0(unless_refused, checkpoint.set_aside, path)
            continue
        refuse_other_inputs(reader, run.checked, run.teachers)
        coordinator.on_all_ranks(run.engine.load, reader)
        run.engine.finish_load(reader)
        coordinator.on_all_ranks(reader.fill, run.method.fragments())
        run.method.load_extra_state(reader.meta["method"])
        done("load")
        state = TrainState.load(reader.meta["state"])
        if state.samples != state.step * run.checked.config.schedule.global_batch:
            raise UserError(f"{path}: {state.samples} samples are not {state.step} steps of the global batch")
        return state
    return None


def opened(
    path: Path, coordinator: Coordinator, done: Callable[[str], None]
) -> tuple[checkpoint.CheckpointReader | None, str]:
    """A reader of a checkpoint all of whose files were checked, else None and what is damaged in it. Collective.

    Rank 0 reads the manifest and checks the files' sizes for all; each rank reads its share of the files.
    """
    reader, damage = coordinator.on_rank0(read_twice, checkpoint.CheckpointReader, path)
    done("manifest")
    if reader is not None:
        _, mine = coordinator.on_all_ranks(read_twice, reader.verify, coordinator.rank, coordinator.world)
        damage = next((text for text in coordinator.gather(mine) if text), "")
        done("verify")
    return (None, damage) if damage else (reader, "")


def read_twice(work: Callable[..., T], *args: Any) -> tuple[T | None, str]:
    """(what `work` gives, ""), else None and the damage that it finds, which counts when a second read finds it too.

    Anything else that fails is raised.
    """
    damage = ""
    for _ in range(2):
        try:
            return work(*args), ""
        except checkpoint.CheckpointError as error:
            damage = str(error)
    return None, damage


def unless_refused(work: Callable[..., None], *args: Any) -> None:
    """Do what the run can go on without; the next save tries to tidy up again."""
    try:
        work(*args)
    except OSError as error:
        warn(f"{error}; left as it is")


def refuse_other_inputs(reader: checkpoint.CheckpointReader, checked: CheckedRun, teachers: TeacherEnsemble) -> None:
    """The images and the teachers are inputs like the recipe, but are known only by their content."""
    if reader.meta["data"] != checked.manifest.fingerprint:
        raise UserError(
            f"data.shards = {checked.config.data.shards} holds other samples, or mixes them with other weights, than "
            f"{reader.path} was trained on; undo that, or start a new run from its weights with --fork NEW_RUN_DIR"
        )
    if reader.meta["teachers"] != teachers.identities():
        raise UserError(f"the teachers' weights differ from those that {reader.path} was trained with")
