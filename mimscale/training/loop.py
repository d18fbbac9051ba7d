"""Pre-training: check -> build -> resume -> loop -> save. Read `train` from top to bottom; all else serves it.

One process per rank. Everything random comes in with the batch, so the sequence of batches, masks and drop paths is a
function of the step alone, whatever the number of ranks or workers and however often the run was stopped.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import Tensor

from mimscale.checkpoint import format as checkpoint
from mimscale.checkpoint import run_folder
from mimscale.checkpoint.async_writer import AsyncCheckpointWriter
from mimscale.config.run import method_class
from mimscale.convert import start
from mimscale.data.device_prefetch import DevicePrefetcher
from mimscale.data.loader import TrainLoader
from mimscale.data.wds_stream import NOTE
from mimscale.distributed.coordination import Coordinator
from mimscale.distributed.world import close_process_group
from mimscale.engine.deepspeed_engine import Engine
from mimscale.engine.deepspeed_runtime import open_process_group
from mimscale.engine.sharded_module import split_over_ranks
from mimscale.errors import Stopped
from mimscale.fault_tolerance import activations
from mimscale.fault_tolerance.preemption import Preemption, ignore_signals, leave_requeue_marker, there
from mimscale.fault_tolerance.retrying_writer import RetryingWriter
from mimscale.fault_tolerance.run_lock import RunLock
from mimscale.fault_tolerance.step_guard import StepGuard
from mimscale.fault_tolerance.watchdog import Watchdog
from mimscale.methods.base import Method
from mimscale.monitoring.damage_log import DamageLog
from mimscale.monitoring.metrics import StartupTimer, ThroughputMeter
from mimscale.monitoring.panels import SAMPLES
from mimscale.monitoring.phase_timer import BACKWARD, BETWEEN, FORWARD, SAVING, WAITING, PhaseTimer
from mimscale.monitoring.run_logger import RunLogger
from mimscale.teachers.ensemble import TeacherEnsemble
from mimscale.teachers.prefetcher import TeacherPrefetcher
from mimscale.training.recovery import TrainContext, describe_state, explain, flush_writes, restore, roll_back
from mimscale.training.setup import Plan, open_damage_log
from mimscale.training.state import TrainState
from mimscale.types import Batch, StepInfo, Targets


def train(plan: Plan, startup: StartupTimer) -> None:
    """Run to the last step, or to the step at which a signal asks to stop. Saves at either."""
    run, world = plan.run, plan.world
    if (plan.run_dir / "done").exists():
        if world.rank == 0:
            print(f"{plan.run_dir} is finished; nothing to do", file=sys.stderr)
        return

    timer = PhaseTimer(world.device)
    watch = Watchdog(plan.run_dir, world.rank, run.watchdog, timer)
    preemption = Preemption(stop_files=run_folder.stop_files(plan.run_dir))
    torch.manual_seed(run.seed)
    method: Method = method_class(run.method.name)(run, plan.teachers)
    started = start.start_from(method, run) if plan.fresh and run.init is not None else ()
    needs, image_size = method.needs.teachers, run.data.image_size
    ensemble = TeacherEnsemble(run.teachers, plan.skeletons, needs, image_size, world.device)
    startup.end("model")  # before the ranks connect: a missing teacher file is still one line
    lock = RunLock(plan.run_dir) if world.rank == 0 else None
    startup.end("lock")
    open_process_group(world)
    watch.control = control = Coordinator()
    startup.end("process_group")
    engine = Engine(method, run, world)
    ensemble.shard(partial(split_over_ranks, world=world))
    ensemble.check()
    method.before_run(plan.manifest.samples)
    startup.end("engine")
    writer = RetryingWriter()
    logger = RunLogger(plan.run_dir, writer, active=world.rank == 0)
    context = TrainContext(plan, engine, method, ensemble, control, logger, writer)
    state = restore(context, startup).launched()
    control.on_rank0(open_folder, context, state)
    unchanged = lock.check if lock is not None else lambda: None
    saver = AsyncCheckpointWriter(
        context.checkpoints,
        control,
        run.checkpoint,
        context.live_tensors(),
        unchanged,
        logger.log_event,
        alive=watch.alive,
    )
    guard = StepGuard(run.guard, engine.accumulation, world.device)
    guard.load(state.guard)
    startup.end("buffers")

    loader, prefetcher = open_prefetcher(context, state)
    logger.start(total=plan.total_steps, step=state.step, tensorboard=run.log.tensorboard)
    logger.print("\n".join((describe_run(plan, engine, state), *started)))
    damage_log = open_damage_log(run, plan.run_dir, plan.manifest, writer if world.rank == 0 else None)
    timer.enter(WAITING)
    if state.step < plan.total_steps:
        prefetcher.next_batch()  # the loop gets this batch again
    startup.end("workers")
    throughput = ThroughputMeter(world.device, waited_s=lambda: timer.seconds[WAITING])
    timer.lap()

    def judge(loss: Tensor) -> Tensor:
        timer.enter(BACKWARD)
        return guard.check_loss(loss)

    while state.step < plan.total_steps:
        engine.set_lr(plan.lr(state.step))
        engine.set_clip(guard.clip(run.optim.clip))
        ids, losses = list[Tensor](), list[Tensor]()
        for _ in range(engine.accumulation):
            timer.enter(WAITING)
            raw = prefetcher.next_batch()
            ids.append(raw.ids)
            timer.ids = ids  # not before there are any: who waits for data names those of the last step
            damage_log.add(raw.damage)
            timer.enter(FORWARD)
            batch, targets = prefetcher.targets()
            scalars = engine.micro_step(batch, targets, judge)
            losses.append(scalars["loss"])
            throughput.add(scalars, images=len(batch.ids) * world.size)
        loss = torch.stack(losses).mean()
        info = StepInfo(state.step + 1, plan.total_steps, engine.skipped, loss, batch, targets, no_parameters)
        method.after_step(info)
        state = state.advanced(run.schedule.global_batch, timer.lap())
        watch.beat(state.step)
        timer.enter(BETWEEN)

        if guard.reads_norm_at(state.step):
            guard.observe_norm(engine.gradient_norm())
        back = guard.update(engine.skipped, engine.loss_scale)
        if engine.skipped:
            explain(context, guard, state.step, ids, batch, targets)
        if back:
            saver.wait_for_writes()
            reached, state = state.step, roll_back(context, guard, state)
            if state.step < reached:
                loader.close()
                loader, prefetcher = open_prefetcher(context, state)
                throughput.restart()
                continue

        last = state.step == plan.total_steps
        tell(context, startup, timer, throughput, damage_log, state)
        if run.log.panels and (last or state.step % run.log.panels == 0):
            few = {name: seen.first(SAMPLES) for name, seen in targets.items()}
            logger.add_panel(state.step, method.visualise(batch.first(SAMPLES), few))
        stop = saver.agree_to_stop(preemption.raised() or damage_log.full) and not last
        if stop or last:
            timer.enter(SAVING)
            ignore_signals()
            saver.wait_for_writes()
        if stop or last or (run.checkpoint.every and state.step % run.checkpoint.every == 0):
            list_damage(context, damage_log)  # a run that goes on from here does not meet it again
            save(context, saver, guard, state, batch, targets)
        if stop:
            break

    end(context, saver, damage_log, preemption, state)
    loader.close()
    control.barrier()
    engine.close()
    close_process_group()
    watch.close()
    if lock is not None:
        lock.release()


def no_parameters(prefix: str) -> Iterator[tuple[str, Tensor]]:
    raise NotImplementedError("the engine does not offer whole parameters yet")


def open_prefetcher(context: TrainContext, state: TrainState) -> tuple[TrainLoader, TeacherPrefetcher]:
    """This rank's micro-batches from the state's step on, bare and with what the teachers saw; starts the workers."""
    plan, device = context.plan, context.plan.world.device
    loader = TrainLoader(
        plan.manifest,
        plan.run.data,
        context.method.needs,
        seed=plan.run.seed,
        global_batch=plan.run.schedule.global_batch,
        micro_batch=context.engine.micro_batch,
        rank=plan.world.rank,
        world=plan.world.size,
        start_step=state.step,
        jumps=state.jumps,
        pin=device.type == "cuda",
        device=device,
    )
    ahead = plan.run.engine.teachers_ahead
    return loader, TeacherPrefetcher(
        context.ensemble, device, DevicePrefetcher(iter(loader), device), ahead=ahead, prepare=context.method.prepare
    )


def tell(
    context: TrainContext,
    startup: StartupTimer,
    timer: PhaseTimer,
    throughput: ThroughputMeter,
    damage_log: DamageLog,
    state: TrainState,
) -> None:
    """What is due after a step: how long the first one took to come, who is slow, the log line. Collective."""
    plan, engine, logger, step = context.plan, context.engine, context.logger, state.step
    if "first_step" not in startup.seconds:
        startup.end("first_step")
        logger.log_event("first_step", seconds=startup.seconds, cpu_s=startup.cpu_s)
    if plan.run.watchdog.every and step % plan.run.watchdog.every == 0:
        for line in timer.compare(context.control):
            logger.print(line)
            logger.log_event("spread", at=step, line=line)
    if step == plan.total_steps or step % plan.run.log.every == 0:
        metrics = throughput.read()
        metrics |= {
            "lr": plan.lr(step - 1),
            "grad_norm": engine.gradient_norm(),
            "loss_scale": engine.loss_scale or 1.0,
        }
        metrics |= {"epoch": step / plan.steps_per_epoch, "skipped_steps": float(engine.skipped_steps)}
        list_damage(context, damage_log)
        logger.log_step(step, metrics | {"damaged": float(damage_log.total)})


def list_damage(context: TrainContext, damage_log: DamageLog) -> None:
    """What any rank could not use since the last call goes into the run's list. Collective."""
    for damage in damage_log.merge(context.control.gather(damage_log.take())):
        context.logger.log_event("damaged", **asdict(damage))
        context.logger.print(
            f"damaged: {damage.shard}, key {damage.key}: {damage.reason}; another sample took its place"
        )


def save(
    context: TrainContext,
    saver: AsyncCheckpointWriter,
    guard: StepGuard,
    state: TrainState,
    batch: Batch,
    targets: Mapping[str, Targets],
) -> None:
    """Begin a checkpoint. In fp16 the guard notes how large the layers' outputs are when all is well. Collective."""
    state = replace(state, guard=guard.dump())
    if context.engine.loss_scale is not None:
        guard.usual = activations.magnitudes(context.method, partial(context.method, batch, targets))
    saver.save(state.step, context.live_tensors(), describe_state(context, state))


def end(
    context: TrainContext,
    saver: AsyncCheckpointWriter,
    damage_log: DamageLog,
    preemption: Preemption,
    state: TrainState,
) -> None:
    """Wait for the last save, and leave what says how the run ended: `done`, or a wish to run again. Collective.

    Raises Stopped where the last step could not be saved, or too many samples are damaged.
    """
    plan, logger, saved = context.plan, context.logger, saver.wait_for_writes()
    newest, verdict = checkpoint.newest_step(plan.run_dir), None
    if state.step < plan.total_steps:
        reason = "too many damaged samples" if damage_log.full else preemption.reason
        logger.log_event("stopped", at=state.step, reason=reason)
        fate = "saved" if saved else f"NOT saved; {newest} is the newest"
        logger.print(f"stopped at step {state.step} ({reason or 'asked by another rank'}), {fate}")
        if damage_log.full:
            verdict = damage_log.verdict()
        elif plan.world.rank == 0 and not there(run_folder.stop_wish(plan.run_dir)):
            leave_requeue_marker(context.writer, newest)
    elif not saved:
        verdict = f"the last checkpoint could not be written; {newest} is the newest"
    else:
        if plan.world.rank == 0:
            context.writer.replace(plan.run_dir / "done", f"{state.step}\n")
        logger.print(f"done: {plan.run_dir}, step {state.step}")
    logger.close()
    context.control.finish_pending()
    context.control.on_rank0(flush_writes, context)
    if verdict is not None:
        raise Stopped(verdict)


def open_folder(context: TrainContext, state: TrainState) -> None:
    """Rank 0: the configuration once, a line about this launch each time."""
    plan = context.plan
    if not (plan.run_dir / "config.yaml").exists():
        run_folder.create(plan.run_dir, plan.run)
    launch = run_folder.launch(
        plan.command,
        ranks=plan.world.size,
        device=str(plan.world.device.type),
        ds_config=plan.run.engine.ds_config,
        step=state.step,
        forked_from=None if plan.parent is None else str(plan.parent),
    )
    context.writer.append(plan.run_dir / "launches.jsonl", json.dumps(launch) + "\n")


def describe_run(plan: Plan, engine: Engine, state: TrainState) -> str:
    run, parameters = plan.run, sum(math.prod(shape) for shape in engine.layout.shapes().values())
    return (
        f"{run.method.name}: {parameters / 1e6:.1f} M parameters, {run.engine.ds_config}, {plan.world.size} ranks on "
        f"{plan.world.device.type}, batch {run.schedule.global_batch} = {engine.micro_batch} x {engine.accumulation} x "
        f"{plan.world.size}, peak lr {run.schedule.peak_lr:.3g}, {plan.manifest.samples} images, "
        f"step {state.step} of {plan.total_steps}, folder {plan.run_dir}"
        + ("" if run.data.stream is None else f"\n{NOTE}")
    )
