"""Steps that did not reach the weights: explain one, go back over a row of them, or end the run with a report.

All functions that take a `TrainContext` are collective unless they say "rank 0".
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from mimscale.checkpoint import format as checkpoint
from mimscale.config.compiler import uncompiled
from mimscale.data.mixture import order_of
from mimscale.data.order import batch_of, jumped, rank_positions
from mimscale.data.wds_stream import Source, WebDatasetStream
from mimscale.errors import Stopped, warn
from mimscale.fault_tolerance import activation_magnitudes
from mimscale.monitoring.run_logger import finite
from mimscale.training.context import TrainContext
from mimscale.training.recovery import load_newest, unless_refused
from mimscale.training.state import TrainState
from mimscale.types import StepInfo


def explain(run: TrainContext, info: StepInfo) -> None:
    """Log why the last step was skipped, which samples are suspected and, once it is serious, which layer.

    Suspected are those of the micro-batches whose loss is bad; where none is, those of the whole step, but nobody while
    it may be fp16's loss scale that finds its size.
    """
    guard, scale, cause = run.guard, run.engine.loss_scale, run.guard.cause()
    bad = set(cause.pop("bad_micro_steps"))
    of_ranks = run.coordinator.gather(
        [(int(i), micro in bad) for micro, part in enumerate(run.inputs.ids) for i in part]
    )
    samples = [sample for of_rank in of_ranks for sample in of_rank]
    suspected, layer = [sample for sample, is_bad in samples if is_bad], None
    if not suspected and (scale is None or guard.serious(scale)):
        suspected = [sample for sample, _ in samples]
    if guard.serious(scale):
        with uncompiled():
            mine = activation_magnitudes.magnitudes(run.method, partial(run.method, info.batch, info.targets))
        sizes = run.coordinator.gather(mine)
        layer = activation_magnitudes.suspect(activation_magnitudes.largest(sizes), guard.usual)
    keys = keys_of(run.checked.manifest, suspected) if run.coordinator.rank == 0 else []
    guard.incidents.append(
        finite({"at": info.step, **cause, "row": guard.streak, "loss_scale": scale, "layer": layer, "keys": keys})
    )
    run.logger.log_event("skipped", **guard.incidents[-1])
    run.logger.print(
        f"step {info.step} was skipped: {cause['why']} (loss {cause['loss']:.4g}, limit {cause['limit']:.4g})"
        f"{f'; {layer}' if layer else ''}"
    )


def roll_back(run: TrainContext, state: TrainState) -> TrainState:
    """Go back to the last checkpoint before the row of bad steps, and jump over the samples around them.

    Without such a checkpoint the run goes on where it is: the bad steps have not touched the weights. Raises Stopped,
    after writing guard.json, when this has been done as often as the recipe allows.
    """
    guard = run.guard
    first_bad = state.step - guard.streak
    if state.rollbacks >= guard.config.rollbacks:
        give_up(run, state)
    older = load_newest(run, until=first_bad)
    if older is None:
        guard.streak = 0
        run.logger.log_event(
            "rollback", at=state.step, to=state.step, why="there is no checkpoint before the bad steps"
        )
        return replace(state, rollbacks=state.rollbacks + 1)
    start = max(older.step, first_bad - guard.config.margin)
    back = state.rolled_back(older, jumped(state.jumps, start, state.step))
    guard.load(back.guard)
    guard.streak = 0
    run.coordinator.on_rank0(unless_refused, checkpoint.forget_after, run.checkpoints, older.step)
    left_out = range(batch_of(start - 1, back.jumps) + 1, batch_of(start, back.jumps))
    if run.coordinator.rank == 0:
        log_jump(run, start, left_out)
    run.logger.log_event(
        "rollback", at=state.step, to=older.step, jump_at=start, batches=[left_out.start, left_out.stop]
    )
    run.logger.print(
        f"rolled back from step {state.step} to {older.step}; from step {start} on {len(left_out)} batches are left out"
    )
    return back


def give_up(run: TrainContext, state: TrainState) -> None:
    """Raise Stopped, with a report in the run folder."""
    guard = run.guard
    worst = next((i for i in reversed(guard.incidents) if i["layer"]), guard.incidents[-1])
    report = {"step": state.step, "rollbacks": state.rollbacks, "incidents": list(guard.incidents)}
    if run.coordinator.rank == 0:
        run.writer.replace(run.checked.run_dir / "guard.json", json.dumps(report, indent=1) + "\n")
    run.coordinator.on_rank0(flush_writes, run)
    advice = "; engine.ds_config=zero2_bf16 would go on in bf16" if run.engine.loss_scale is not None else ""
    raise Stopped(
        f"step {state.step}: {guard.streak} bad steps in a row after {state.rollbacks} roll-backs: {worst['why']}; "
        f"{worst['layer']}; report in {run.checked.run_dir / 'guard.json'}{advice}"
    )


def log_jump(run: TrainContext, start: int, batches: range) -> None:
    """Rank 0: the samples that are left out, one line per global batch; their names too where they are few."""
    checked, config = run.checked, run.checked.config
    if isinstance(checked.manifest, WebDatasetStream):
        return  # nobody knows which samples they would have been
    order = order_of(checked.manifest, config.seed, config.data.streams, config.data.block)
    few = len(batches) * config.schedule.global_batch <= 10_000
    for batch in batches:
        samples = order.ids(rank_positions(batch, config.schedule.global_batch, 0, 1)).tolist()
        keys = keys_of(checked.manifest, samples) if few else None
        line = json.dumps({"from_step": start, "batch": batch, "samples": samples, "keys": keys})
        run.writer.append(checked.run_dir / "left_out.jsonl", line + "\n")


def keys_of(manifest: Source, samples: Sequence[int]) -> list[str]:
    """Names of samples, "?" where they cannot be read."""

    def key(sample: int) -> str:
        try:
            return manifest.key(sample)
        except Exception:  # what is asked for is often what is damaged
            return "?"

    return [key(sample) for sample in samples]


def flush_writes(run: TrainContext) -> None:
    """Rank 0, before the run ends: try for a last while to write what waits, and say what could not be written."""
    config = run.checked.config
    patience_s = min(config.checkpoint.patience_s, config.watchdog.stall_s / 2 or math.inf)  # this wait is no hang
    left = run.writer.flush(patience_s)
    if left:
        warn(f"could not be written: {'; '.join(left)}")
