"""What a run does besides going forward: resume from a checkpoint, explain a skipped step, go back and jump.

The mechanisms stand in `resilience/`, which knows neither methods nor data; here they meet the run. All functions that
take a `TrainContext` are collective.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from mimscale.checkpoint import format as checkpoint
from mimscale.data.order import Order, batch_of, jumped, rank_positions
from mimscale.data.wds_stream import Source, WebDatasetStream
from mimscale.distributed.coordination import Coordinator
from mimscale.engine.deepspeed_engine import Engine
from mimscale.errors import Stopped, UserError, warn
from mimscale.fault_tolerance import activations
from mimscale.fault_tolerance.retrying_writer import RetryingWriter
from mimscale.fault_tolerance.step_guard import StepGuard
from mimscale.methods.base import Method
from mimscale.monitoring.metrics import StartupTimer
from mimscale.monitoring.run_logger import RunLogger, finite
from mimscale.teachers.ensemble import TeacherEnsemble
from mimscale.training.setup import Plan
from mimscale.training.state import TrainState
from mimscale.types import Batch, Targets

T = TypeVar("T")


@dataclass(frozen=True)
class TrainContext:
    """The parts of a run that stay the same from its first to its last step."""

    plan: Plan
    engine: Engine
    method: Method
    ensemble: TeacherEnsemble
    control: Coordinator
    logger: RunLogger
    writer: RetryingWriter

    @property
    def checkpoints(self) -> Path:
        return self.plan.run_dir / "checkpoints"

    def live_tensors(self) -> dict[str, Tensor]:
        """This rank's part of a checkpoint: masters and moments, and what the method learned between steps."""
        return {**self.engine.live_tensors(), **self.method.fragments()}


def describe_state(context: TrainContext, state: TrainState) -> dict[str, Any]:
    """What a checkpoint's manifest says besides where the tensors are."""
    return {
        "step": state.step,
        "state": state.dump(),
        "config": context.plan.run.dump(),
        "data": context.plan.manifest.fingerprint,
        "teachers": context.ensemble.identities(),
        "method": context.method.extra_state(),
        **context.engine.meta(),
    }


# ------------------------------------------------------------------------------------------------ resuming


def restore(context: TrainContext, startup: StartupTimer) -> TrainState:
    """Continue from the newest checkpoint that is whole, else from a fork's parent, else from the beginning."""
    state = load_newest(context, done=startup.end)
    if state is not None:
        return state
    if context.control.on_rank0(lambda root: checkpoint.steps(root) or checkpoint.damaged(root), context.checkpoints):
        raise UserError(
            f"every checkpoint in {context.checkpoints} is damaged; remove the damaged-* folders to start at step 0"
        )
    if context.plan.parent is not None:
        reader, damage = opened(context.plan.parent, context.control, startup.end)
        if reader is None:
            raise UserError(f"--fork: {damage}; start again to take what is now the newest checkpoint of that run")
        context.control.on_all_ranks(context.engine.load_weights, reader)
        context.engine.finish_load(reader, counters=False)
    return TrainState()


def load_newest(
    context: TrainContext, until: float = math.inf, done: Callable[[str], None] = lambda phase: None
) -> TrainState | None:
    """Load the newest whole checkpoint up to step `until`; say why newer ones are passed over, and set them aside.

    done: told of each phase when it ends.
    """
    control = context.control
    for path in reversed(control.on_rank0(checkpoint.steps, context.checkpoints)):
        if checkpoint.step_of(path) > until:
            continue
        reader, damage = opened(path, control, done)
        if reader is None:
            if control.rank == 0:
                warn(f"passing over {path.name}: {damage}")
            control.on_rank0(unless_refused, checkpoint.set_aside, path)
            continue
        refuse_other_inputs(reader, context.plan, context.ensemble)
        control.on_all_ranks(context.engine.load, reader)
        context.engine.finish_load(reader)
        control.on_all_ranks(reader.fill, context.method.fragments())
        context.method.load_extra_state(reader.meta["method"])
        done("load")
        state = TrainState.load(reader.meta["state"])
        if state.samples != state.step * context.plan.run.schedule.global_batch:
            raise UserError(f"{path}: {state.samples} samples are not {state.step} steps of the global batch")
        return state
    return None


def opened(path: Path, control: Coordinator, done: Callable[[str], None]) -> tuple[checkpoint.Reader | None, str]:
    """A reader of a checkpoint all of whose files were checked, else None and what is damaged in it. Collective.

    Rank 0 reads the manifest and looks at the files' sizes for all; each rank reads its share of the files.
    """
    reader, damage = control.on_rank0(looked_twice, checkpoint.Reader, path)
    done("manifest")
    if reader is not None:
        _, mine = control.on_all_ranks(looked_twice, reader.verify, control.rank, control.world)
        damage = next((text for text in control.gather(mine) if text), "")
        done("verify")
    return (None, damage) if damage else (reader, "")


def looked_twice(work: Callable[..., T], *args: Any) -> tuple[T | None, str]:
    """(what `work` gives, ""), else None and the damage that it finds, which counts when a second look sees it too.

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


def refuse_other_inputs(reader: checkpoint.Reader, plan: Plan, ensemble: TeacherEnsemble) -> None:
    """The images and the teachers are inputs like the recipe, but are known only by their content."""
    if reader.meta["data"] != plan.manifest.fingerprint:
        raise UserError(f"data.shards = {plan.run.data.shards} holds other samples than {reader.path} was trained on")
    if reader.meta["teachers"] != ensemble.identities():
        raise UserError(f"the teachers' weights differ from those that {reader.path} was trained with")


# ------------------------------------------------------------------------------------------------ bad steps


def explain(
    context: TrainContext,
    guard: StepGuard,
    step: int,
    ids: Sequence[Tensor],
    batch: Batch,
    targets: Mapping[str, Targets],
) -> None:
    """Log why the last step was skipped, which samples are suspected and, once it is serious, which layer.

    Suspected are those of the micro-batches whose loss is bad; where none is, those of the whole step, but nobody while
    it may be fp16's loss scale that finds its size.
    ids: of each of the step's micro-batches on this rank. batch, targets: the last of these.
    """
    scale, cause = context.engine.loss_scale, guard.cause()
    bad = set(cause.pop("bad_micro_steps"))
    of_ranks = context.control.gather([(int(i), micro in bad) for micro, part in enumerate(ids) for i in part])
    samples = [sample for of_rank in of_ranks for sample in of_rank]
    suspected, layer = [sample for sample, is_bad in samples if is_bad], None
    if not suspected and (scale is None or guard.serious(scale)):
        suspected = [sample for sample, _ in samples]
    if guard.serious(scale):
        sizes = context.control.gather(activations.magnitudes(context.method, partial(context.method, batch, targets)))
        layer = activations.suspect(activations.largest(sizes), guard.usual)
    keys = keys_of(context.plan.manifest, suspected) if context.control.rank == 0 else []
    guard.incidents.append(
        finite({"at": step, **cause, "row": guard.streak, "loss_scale": scale, "layer": layer, "keys": keys})
    )
    context.logger.log_event("skipped", **guard.incidents[-1])
    context.logger.print(
        f"step {step} was skipped: {cause['why']} (loss {cause['loss']:.4g}, limit {cause['limit']:.4g})"
        f"{f'; {layer}' if layer else ''}"
    )


def roll_back(context: TrainContext, guard: StepGuard, state: TrainState) -> TrainState:
    """Go back to the last checkpoint before the row of bad steps, and jump over the samples around them.

    Without such a checkpoint the run goes on where it is: the bad steps have not touched the weights. Raises Stopped,
    after writing guard.json, when this has been done as often as the recipe allows.
    """
    first_bad = state.step - guard.streak
    if state.rollbacks >= guard.config.rollbacks:
        give_up(context, guard, state)
    older = load_newest(context, until=first_bad)
    if older is None:
        guard.streak = 0
        context.logger.log_event(
            "rollback", at=state.step, to=state.step, why="there is no checkpoint before the bad steps"
        )
        return replace(state, rollbacks=state.rollbacks + 1)
    start = max(older.step, first_bad - guard.config.margin)
    back = state.rolled_back(older, jumped(state.jumps, start, state.step))
    guard.load(back.guard)
    guard.streak = 0
    context.control.on_rank0(unless_refused, checkpoint.forget_after, context.checkpoints, older.step)
    left_out = range(batch_of(start - 1, back.jumps) + 1, batch_of(start, back.jumps))
    if context.control.rank == 0:
        log_jump(context, start, left_out)
    context.logger.log_event(
        "rollback", at=state.step, to=older.step, jump_at=start, batches=[left_out.start, left_out.stop]
    )
    context.logger.print(
        f"rolled back from step {state.step} to {older.step}; from step {start} on {len(left_out)} batches are left out"
    )
    return back


def give_up(context: TrainContext, guard: StepGuard, state: TrainState) -> None:
    """Raise Stopped, with a report in the run folder."""
    worst = next((i for i in reversed(guard.incidents) if i["layer"]), guard.incidents[-1])
    report = {"step": state.step, "rollbacks": state.rollbacks, "incidents": list(guard.incidents)}
    if context.control.rank == 0:
        context.writer.replace(context.plan.run_dir / "guard.json", json.dumps(report, indent=1) + "\n")
    context.control.on_rank0(flush_writes, context)
    advice = "; engine.ds_config=zero2_bf16 would go on in bf16" if context.engine.loss_scale is not None else ""
    raise Stopped(
        f"step {state.step}: {guard.streak} bad steps in a row after {state.rollbacks} roll-backs: {worst['why']}; "
        f"{worst['layer']}; report in {context.plan.run_dir / 'guard.json'}{advice}"
    )


def flush_writes(context: TrainContext) -> None:
    """Rank 0, before the run ends: try for a last while to write what waits, and say what could not be written."""
    run = context.plan.run
    left = context.writer.flush(min(run.checkpoint.patience_s, run.watchdog.stall_s / 2 or math.inf))  # it is no hang
    if left:
        warn(f"could not be written: {'; '.join(left)}")


def log_jump(context: TrainContext, start: int, batches: range) -> None:
    """Rank 0: the samples that are left out, one line per global batch; their names too where they are few."""
    plan, run = context.plan, context.plan.run
    if isinstance(plan.manifest, WebDatasetStream):
        return  # nobody knows which samples they would have been
    order = Order(plan.manifest, run.seed, run.data.streams, run.data.block)
    few = len(batches) * run.schedule.global_batch <= 10_000
    for batch in batches:
        samples = order.ids(rank_positions(batch, run.schedule.global_batch, 0, 1)).tolist()
        keys = keys_of(plan.manifest, samples) if few else None
        line = json.dumps({"from_step": start, "batch": batch, "samples": samples, "keys": keys})
        context.writer.append(plan.run_dir / "left_out.jsonl", line + "\n")


def keys_of(manifest: Source, samples: Sequence[int]) -> list[str]:
    """Names of samples, "?" where the file system does not tell."""

    def key(sample: int) -> str:
        try:
            return manifest.key(sample)
        except Exception:  # what is asked for is often what is damaged
            return "?"

    return [key(sample) for sample in samples]
