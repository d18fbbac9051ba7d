"""Everything that a run does besides training: watch the ranks, check the step, log, draw, save, roll back and stop."""

from __future__ import annotations

import gc
import json
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

from mimscale.checkpoint import format as checkpoint
from mimscale.checkpoint import run_folder
from mimscale.checkpoint.async_writer import AsyncCheckpointWriter
from mimscale.config.compiler import compile_seconds, uncompiled
from mimscale.data.mixture import Mixture
from mimscale.data.wds_stream import NOT_EXACT
from mimscale.errors import Stopped, UserError
from mimscale.fault_tolerance import activation_magnitudes
from mimscale.fault_tolerance.preemption import ignore_signals, leave_requeue_marker, there
from mimscale.monitoring.metrics import ThroughputMeter
from mimscale.monitoring.phase_timer import BETWEEN, EVALUATING, SAVING, WAITING
from mimscale.monitoring.profile_window import ProfileWindow
from mimscale.training.bad_steps import explain, flush_writes, roll_back
from mimscale.training.context import TrainContext
from mimscale.training.panel_inputs import PanelInputs
from mimscale.training.recovery import describe_state
from mimscale.training.state import TrainState
from mimscale.types import StepInfo

if TYPE_CHECKING:
    from mimscale.evals.while_training import Evaluation

GC_EVERY = 200
"""Steps between garbage collections. Python's own would start in other steps on each rank, and all ranks would wait for
each of them; between collections the few cycles of a step are small."""


class Monitor:
    """One per run, made when the parts of the run are built and its state is restored. Every call is collective.

    stopped: whether the run is to end before its last step, because a signal or a stop file asked, or because too many
    samples are damaged. The state was saved then, or said not to be.
    """

    def __init__(self, run: TrainContext, state: TrainState) -> None:
        checked = run.checked
        self._run, self.stopped = run, False
        run.coordinator.on_rank0(open_folder, run, state)
        self._checkpoints = AsyncCheckpointWriter(
            run.checkpoints,
            run.coordinator,
            checked.config.checkpoint,
            run.fragments(),
            run.lock.check if run.lock is not None else lambda: None,
            run.logger.log_event,
            alive=run.watchdog.alive,
        )
        run.coordinator.on_all_ranks(check_file_size_limit, self._checkpoints.bytes)
        run.guard.load(state.guard)
        run.startup.end("buffers")

        run.inputs.start(state)
        log, recipe = checked.config.log, checked.config.dump()
        run.logger.start(total=checked.total_steps, step=state.step, log=log, recipe=recipe)
        notes = (*run.cost_notes, *run.init_notes, *run.method.notes, *run.teachers.notes, *run.engine.notes)
        if run.evaluator is not None:
            notes = (*run.evaluator.notes, *notes)
        if run.top1 is not None:
            notes = (*run.top1.notes, *notes)
        run.logger.print("\n".join((describe_run(run, state), *notes)))
        self._panel_inputs = PanelInputs(run)
        self._engine_notes = len(run.engine.notes)
        if state.step < checked.total_steps:
            run.inputs.wait_for_first()
        run.startup.end("workers")
        run.timer.enter(BETWEEN)  # the wait for the first batch is part of the start
        self._throughput = ThroughputMeter(
            checked.world.device,
            waited_s=lambda: run.timer.seconds[WAITING],
            host_share=run.timer.host_share,
            cost=run.cost,
        )
        gc.collect()
        run.closing.callback(gc.enable)
        run.closing.callback(gc.unfreeze)
        gc.freeze()
        gc.disable()
        run.preemption.phase = "loop"
        self._profile = ProfileWindow(
            checked.run_dir,
            checked.config.log.profile,
            checked.world.rank,
            checked.world.device,
            run.logger.print,
            run.logger.log_event,
        )
        self._profile.before_step(state.step + 1)
        run.timer.lap()

    def after_step(self, state: TrainState, info: StepInfo) -> TrainState:
        """The state to continue from: one step further, or that of an older checkpoint after a row of bad steps."""
        run, config = self._run, self._run.checked.config
        for scalars in info.scalars:
            self._throughput.add(scalars, images=len(info.batch.ids) * run.checked.world.size)
        state = state.advanced(config.schedule.global_batch, run.timer.lap())
        run.watchdog.beat(info.step)
        run.timer.enter(BETWEEN)
        self._throughput.leave_out(self._profile.after_step(info.step))
        if info.step % GC_EVERY == 0:
            gc.collect()

        rolled_back = self._check_step(state, info)
        if rolled_back is not None:
            state = rolled_back
            if state.step < info.step:
                run.inputs.start(state)
                self._throughput.restart()
                self._profile.after_step(state.step)
                self._profile.before_step(state.step + 1)
                return state
        self._log_step(info)
        self._evaluate(info)
        self._draw_panel(info)
        self._save_and_stop(state, info)
        self._profile.before_step(info.step + 1)
        return state

    def finish(self, state: TrainState) -> None:
        """Wait for the last save, write `done` or a wish to run again, and free the engine.

        Raises Stopped where the last step could not be saved, or too many samples are damaged.
        """
        run = self._run
        self._profile.close(state.step)
        failure = self._say_how_it_ended(state, saved=bool(self._checkpoints.wait_for_writes()))
        run.logger.close(done=failure is None and state.step == run.checked.total_steps)
        run.coordinator.finish_pending()
        run.coordinator.on_rank0(flush_writes, run)
        run.inputs.close()
        run.coordinator.barrier()
        run.engine.close()
        if failure is not None:  # the same on all ranks
            raise Stopped(failure)

    # ---------------------------------------------------------------------------------------------- parts of a step

    def _check_step(self, state: TrainState, info: StepInfo) -> TrainState | None:
        """Explain a skipped step. After a row of them: the state of an older checkpoint, else None."""
        run = self._run
        if run.guard.reads_norm_at(info.step):
            run.guard.observe_norm(run.engine.gradient_norm())
        row_is_full = run.guard.update(info.skipped, run.engine.loss_scale)
        if info.skipped:
            explain(run, info)
        if not row_is_full:
            return None
        self._checkpoints.wait_for_writes()
        return roll_back(run, state)

    def _log_step(self, info: StepInfo) -> None:
        """What is due after a step: the start-up times once, the slow ranks, the line of metrics."""
        run, step = self._run, info.step
        checked, config = run.checked, run.checked.config
        if "first_step" not in run.startup.seconds:
            run.startup.end("first_step")
            run.startup.move("first_step", "compile", compile_seconds())
            for line in run.engine.notes[self._engine_notes :]:
                run.logger.print(line)
            run.logger.log_event("first_step", seconds=run.startup.seconds, cpu_s=run.startup.cpu_s)
        if config.watchdog.every and step % config.watchdog.every == 0:
            for line in run.timer.compare(run.coordinator):
                run.logger.print(line)
                run.logger.log_event("slow_rank", at=step, line=line)
        if step == info.total or step % config.log.every == 0:
            metrics = self._throughput.read()
            metrics |= {
                "lr": checked.lr(step - 1),
                "grad_norm": run.engine.gradient_norm(),
                "loss_scale": run.engine.loss_scale or 1.0,
                "epoch": step / checked.steps_per_epoch,
                "skipped_steps": float(run.engine.skipped_steps),
            }
            self._log_damage()
            run.logger.log_step(step, metrics | {"damaged": float(run.damage_log.total)})

    def _evaluate(self, info: StepInfo) -> None:
        """Measure the student where it is due. What fails is logged and the run trains on: no figure is worth a run."""
        run, evaluator, top1 = self._run, self._run.evaluator, self._run.top1
        if evaluator is not None and evaluator.checked.due(info.step, info.total):
            buffers = run.method.student.named_buffers()
            self._measure(info, partial(evaluator.evaluate, run.engine.parameters, buffers))
        if top1 is not None and top1.due(info.step, info.total):
            self._measure(info, partial(top1.evaluate, run.engine.parameters, run.method.named_buffers()))

    def _measure(self, info: StepInfo, evaluate: Callable[[], Evaluation]) -> None:
        run = self._run
        run.timer.enter(EVALUATING)
        start_s = time.perf_counter()
        try:
            found = evaluate()
        except Exception as error:  # of data, memory or a protocol, and the same on all ranks
            text = " ".join(str(error).split())[:300]
            run.logger.log_event("evals_failed", at=info.step, error=f"{type(error).__name__}: {text}")
            run.logger.print(f"evals at step {info.step} failed, training goes on: {text}")
        else:
            run.logger.log_evaluation(info.step, found.metrics, time.perf_counter() - start_s)
            for line in found.warnings:
                run.logger.print(f"evals at step {info.step}: {line}")
        self._throughput.leave_out(time.perf_counter() - start_s)
        run.timer.enter(BETWEEN)

    def _draw_panel(self, info: StepInfo) -> None:
        run, every = self._run, self._run.checked.config.log.panels
        if every and (info.step == info.total or info.step % every == 0):
            with uncompiled():
                batch, targets = self._panel_inputs.of(info)
                run.logger.add_panel(info.step, run.method.visualise(batch, targets))

    def _save_and_stop(self, state: TrainState, info: StepInfo) -> None:
        run, last = self._run, info.step == info.total
        every = run.checked.config.checkpoint.every
        asked = run.preemption.raised() or run.damage_log.full
        self.stopped = self._checkpoints.poll(asked) and not last
        if self.stopped or last:
            run.timer.enter(SAVING)
            ignore_signals()
            run.preemption.phase = "end"
            self._checkpoints.wait_for_writes()
        if self.stopped or last or (every and info.step % every == 0):
            self._log_damage()  # a run that goes on from here does not meet it again
            self._save(state, info)

    def _save(self, state: TrainState, info: StepInfo) -> None:
        """Begin a checkpoint. In fp16 the guard keeps how large the layers' outputs are when all is well."""
        run = self._run
        state = replace(state, guard=run.guard.dump())
        if run.engine.loss_scale is not None:
            forward = partial(run.method, info.batch, info.targets)
            with uncompiled():
                run.guard.usual = activation_magnitudes.magnitudes(run.method, forward)
        self._checkpoints.save(state.step, run.fragments(), describe_state(run, state))

    def _log_damage(self) -> None:
        """What any rank could not use since the last call goes into the run's list."""
        run = self._run
        for damage in run.damage_log.merge(run.coordinator.gather(run.damage_log.take())):
            run.logger.log_event("damaged", **asdict(damage))
            run.logger.print(
                f"damaged: {damage.shard}, key {damage.key}: {damage.reason}; another sample took its place"
            )

    def _say_how_it_ended(self, state: TrainState, saved: bool) -> str | None:
        """Log it and leave the file that says it; a line where the run failed."""
        run, checked = self._run, self._run.checked
        newest = checkpoint.newest_step(checked.run_dir)
        if state.step < checked.total_steps:
            reason = "too many damaged samples" if run.damage_log.full else run.preemption.reason
            run.logger.log_event("stopped", at=state.step, reason=reason)
            fate = "saved" if saved else f"NOT saved; {newest} is the newest"
            run.logger.print(f"stopped at step {state.step} ({reason or 'asked by another rank'}), {fate}")
            if run.damage_log.full:
                return run.damage_log.verdict()
            by_hand = run.preemption.reason == "SIGINT" or there(run_folder.stop_wish(checked.run_dir))
            if checked.world.rank == 0 and not by_hand:
                leave_requeue_marker(run.writer, newest)
            return None
        if not saved:
            return f"the last checkpoint could not be written; {newest} is the newest"
        if checked.world.rank == 0:
            run.writer.replace(checked.run_dir / "done", f"{state.step}\n")
        run.logger.print(f"done: {checked.run_dir}, step {state.step}")
        return None


def check_file_size_limit(needed: int) -> None:
    """Raise UserError where a checkpoint's file, of `needed` bytes, could never be written by this process."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if 0 <= limit < needed:  # RLIM_INFINITY is -1
        raise UserError(
            f"this process may write files of {limit} bytes, and a checkpoint needs {needed} on each rank; raise the "
            f"limit (ulimit -f unlimited)"
        )


def open_folder(run: TrainContext, state: TrainState) -> None:
    """Rank 0: the configuration once; each time a line about this launch, and in the log the step from which it goes
    on.
    """
    checked = run.checked
    if not (checked.run_dir / "config.yaml").exists():
        run_folder.create(checked.run_dir, checked.config)
    launch = run_folder.launch(
        checked.command,
        recipe=checked.recipe,
        ranks=checked.world.size,
        device=str(checked.world.device.type),
        ds_config=checked.config.engine.ds_config,
        method=checked.config.method.name,
        step=state.step,
        total_steps=checked.total_steps,
        steps_per_epoch=checked.steps_per_epoch,
        forked_from=None if checked.parent is None else str(checked.parent),
    )
    run.writer.append(checked.run_dir / "launches.jsonl", json.dumps(launch) + "\n")
    run.logger.log_event("start", at=state.step)


def describe_run(run: TrainContext, state: TrainState) -> str:
    checked, config = run.checked, run.checked.config
    return (
        f"{config.method.name}: {run.parameter_count / 1e6:.1f} M parameters, {config.engine.ds_config}, "
        f"{checked.world.device.type}, global batch {config.schedule.global_batch} = "
        f"micro-batch {checked.micro_batch} x accumulation {checked.accumulation} x ranks {checked.world.size}, "
        f"peak lr {config.schedule.peak_lr:.3g}, "
        f"{checked.manifest.samples} images, step {state.step} of {checked.total_steps}, folder {checked.run_dir}"
        + ("" if config.data.stream is None else f"\n{NOT_EXACT}")
        + (f"\nmixture: {checked.manifest.describe()}" if isinstance(checked.manifest, Mixture) else "")
    )
