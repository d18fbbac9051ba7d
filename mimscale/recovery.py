"""What a run does besides going forward: resume from a checkpoint, explain a skipped step, go back and jump.

The mechanisms stand in `resilience/`, which knows neither methods nor data; here they meet the run. All functions that
take a `Rig` are collective.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mimscale import run_folder
from mimscale.contracts import Batch, Targets
from mimscale.data.foreign import Foreign, Source
from mimscale.data.order import Order, batch_of, jumped, rank_positions
from mimscale.engine.engine import Engine
from mimscale.errors import Stopped, UserError
from mimscale.methods.base import Method
from mimscale.observe.logbook import Logbook
from mimscale.prepare import Plan
from mimscale.resilience import activations, checkpoint
from mimscale.resilience.control import Control
from mimscale.resilience.guard import Guard
from mimscale.state import TrainState
from mimscale.teachers.bank import Bank


@dataclass(frozen=True)
class Rig:
    """The parts of a run that stay the same from its first to its last step."""

    plan: Plan
    engine: Engine
    method: Method
    bank: Bank
    control: Control

    @property
    def checkpoints(self) -> Path:
        return self.plan.run_dir / "checkpoints"

    def live_tensors(self) -> dict[str, Tensor]:
        """This rank's part of a checkpoint: masters and moments, and what the method learned between steps."""
        return {**self.engine.live_tensors(), **self.method.live_tensors()}


def describe_state(rig: Rig, state: TrainState) -> dict[str, Any]:
    """What a checkpoint's manifest says besides where the tensors are."""
    return {
        "step": state.step,
        "state": state.dump(),
        "config": rig.plan.run.dump(),
        "data": rig.plan.manifest.fingerprint,
        "teachers": rig.bank.identities(),
        "method": rig.method.extra_state(),
        **rig.engine.meta(),
    }


# ------------------------------------------------------------------------------------------------ resuming


def restore(rig: Rig) -> TrainState:
    """Continue from the newest checkpoint that is whole, else from a fork's parent, else from the beginning."""
    state = load_newest(rig)
    if state is not None:
        return state
    if rig.control.broadcast(checkpoint.damaged(rig.checkpoints)):
        raise UserError(
            f"every checkpoint in {rig.checkpoints} is damaged; remove the damaged-* folders to start at step 0"
        )
    if rig.plan.parent is not None:
        reader, damage = rig.control.together(opened, rig.plan.parent, rig.control)
        wrong = [text for text in rig.control.gather(damage) if text]
        if reader is None or wrong:
            raise UserError(f"--fork: {wrong[0]}; start again to take what is now the newest checkpoint of that run")
        rig.control.together(rig.engine.load_weights, reader)
        rig.engine.finish_load(reader, counters=False)
    return TrainState()


def load_newest(rig: Rig, until: float = math.inf) -> TrainState | None:
    """Load the newest whole checkpoint up to step `until`; say why newer ones are passed over, and set them aside."""
    control = rig.control
    for path in reversed(control.broadcast(checkpoint.steps(rig.checkpoints))):
        if checkpoint.step_of(path) > until:
            continue
        reader, damage = control.together(opened, path, control)
        wrong = [text for text in control.gather(damage) if text]
        if reader is None or wrong:
            if control.rank == 0:
                print(f"passing over {path.name}: {wrong[0]}", file=sys.stderr)
            control.first(checkpoint.set_aside, path)
            continue
        refuse_other_inputs(reader, rig.plan, rig.bank)
        control.together(rig.engine.load, reader)
        rig.engine.finish_load(reader)
        control.together(reader.fill, rig.method.live_tensors())
        rig.method.load_extra_state(reader.meta["method"])
        state = TrainState.load(reader.meta["state"])
        if state.samples != state.step * rig.plan.run.schedule.global_batch:
            raise UserError(f"{path}: {state.samples} samples are not {state.step} steps of the global batch")
        return state
    return None


def opened(path: Path, control: Control) -> tuple[checkpoint.Reader | None, str | None]:
    """A reader of a checkpoint whose files this rank has checked its share of, else what is damaged in it.

    Damage counts when a second look sees it too. Anything else that fails here ends the run and touches nothing.
    """
    damage = ""
    for _ in range(2):
        try:
            reader = checkpoint.Reader(path)
            reader.verify(control.rank, control.world)
            return reader, None
        except checkpoint.CheckpointError as error:
            damage = str(error)
    return None, damage


def refuse_other_inputs(reader: checkpoint.Reader, plan: Plan, bank: Bank) -> None:
    """The images and the teachers are inputs like the recipe, but are known only by their content."""
    if reader.meta["data"] != plan.manifest.fingerprint:
        raise UserError(f"data.shards = {plan.run.data.shards} holds other samples than {reader.path} was trained on")
    if reader.meta["teachers"] != bank.identities():
        raise UserError(f"the teachers' weights differ from those that {reader.path} was trained with")


# ------------------------------------------------------------------------------------------------ bad steps


def explain(
    rig: Rig,
    guard: Guard,
    logbook: Logbook,
    step: int,
    ids: Sequence[Tensor],
    batch: Batch,
    targets: Mapping[str, Targets],
) -> None:
    """Log why the last step was skipped, which samples are suspected and, once it is serious, which layer.

    ids: of each of the step's micro-batches on this rank. batch, targets: the last of these.
    """
    scale, cause = rig.engine.loss_scale, guard.cause()
    mine = [int(sample) for micro in cause.pop("bad_micro_steps") for sample in ids[micro]]
    suspected = [sample for of_rank in rig.control.gather(mine[:32]) for sample in of_rank][:32]
    layer = None
    if guard.serious(scale):
        sizes = rig.control.gather(activations.magnitudes(rig.method, partial(rig.method, batch, targets)))
        layer = activations.suspect(activations.largest(sizes), guard.usual)
    keys = keys_of(rig.plan.manifest, suspected) if rig.control.rank == 0 else []
    guard.incidents.append(
        {"at": step, **cause, "row": guard.streak, "loss_scale": scale, "layer": layer, "keys": keys}
    )
    logbook.event("skipped", **guard.incidents[-1])
    logbook.say(
        f"step {step} was skipped: {cause['why']} (loss {cause['loss']:.4g}, limit {cause['limit']:.4g})"
        f"{f'; {layer}' if layer else ''}"
    )


def roll_back(rig: Rig, guard: Guard, logbook: Logbook, state: TrainState) -> TrainState:
    """Go back to the last checkpoint before the row of bad steps, and jump over the samples around them.

    Without such a checkpoint the run goes on where it is: the bad steps have not touched the weights. Raises Stopped,
    after writing guard.json, when this has been done as often as the recipe allows.
    """
    first_bad = state.step - guard.streak
    if state.rollbacks >= guard.config.rollbacks:
        give_up(rig, guard, state)
    older = load_newest(rig, until=first_bad)
    if older is None:
        guard.streak = 0
        logbook.event("rollback", at=state.step, to=state.step, why="there is no checkpoint before the bad steps")
        return replace(state, rollbacks=state.rollbacks + 1)
    start = max(older.step, first_bad - guard.config.margin)
    back = state.rolled_back(older, jumped(state.jumps, start, state.step))
    guard.load(back.guard)
    guard.streak = 0
    rig.control.first(checkpoint.forget_after, rig.checkpoints, older.step)
    left_out = range(batch_of(start - 1, back.jumps) + 1, batch_of(start, back.jumps))
    rig.control.first(log_jump, rig.plan, start, left_out)
    logbook.event("rollback", at=state.step, to=older.step, jump_at=start, batches=[left_out.start, left_out.stop])
    logbook.say(
        f"rolled back from step {state.step} to {older.step}; from step {start} on {len(left_out)} batches are left out"
    )
    return back


def give_up(rig: Rig, guard: Guard, state: TrainState) -> None:
    """Raise Stopped, with a report in the run folder."""
    worst = next((i for i in reversed(guard.incidents) if i["layer"]), guard.incidents[-1])
    report = {"step": state.step, "rollbacks": state.rollbacks, "incidents": guard.incidents[-100:]}
    rig.control.first(run_folder.write_report, rig.plan.run_dir, "guard.json", report)
    advice = "; engine.ds_config=zero2_bf16 would go on in bf16" if rig.engine.loss_scale is not None else ""
    raise Stopped(
        f"step {state.step}: {guard.streak} bad steps in a row after {state.rollbacks} roll-backs: {worst['why']}; "
        f"{worst['layer']}; report in {rig.plan.run_dir / 'guard.json'}{advice}"
    )


def log_jump(plan: Plan, start: int, batches: range) -> None:
    """Rank 0: the samples that are left out, one line per global batch; their names too where they are few."""
    run = plan.run
    if isinstance(plan.manifest, Foreign):
        return  # nobody knows which samples they would have been
    order = Order(plan.manifest, run.seed, run.data.streams, run.data.block)
    few = len(batches) * run.schedule.global_batch <= 10_000
    with (plan.run_dir / "left_out.jsonl").open("a") as file:
        for batch in batches:
            samples = order.ids(rank_positions(batch, run.schedule.global_batch, 0, 1)).tolist()
            keys = keys_of(plan.manifest, samples) if few else None
            file.write(json.dumps({"from_step": start, "batch": batch, "samples": samples, "keys": keys}) + "\n")


def keys_of(manifest: Source, samples: Sequence[int]) -> list[str]:
    """Names of samples, "?" where the file system does not tell."""

    def key(sample: int) -> str:
        try:
            return manifest.key(sample)
        except Exception:  # what is asked for is often what is damaged
            return "?"

    return [key(sample) for sample in samples]
