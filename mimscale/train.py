"""Pre-training: check -> build -> resume -> loop -> save. Read `train` from top to bottom; all else serves it.

One process per rank. Everything random comes in with the batch, so the sequence of batches, masks and drop paths is a
function of the step alone, whatever the number of ranks or workers and however often the run was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mimscale import run_folder
from mimscale.config import load, method_class, recipe_names
from mimscale.contracts import Batch, Targets
from mimscale.convert import start
from mimscale.data.foreign import NOTE
from mimscale.data.loader import TrainLoader
from mimscale.data.staging import Staging
from mimscale.engine.engine import Engine
from mimscale.engine.frozen import split_over_ranks
from mimscale.engine.world import close_process_group, open_process_group
from mimscale.errors import Stopped
from mimscale.methods.base import Method
from mimscale.observe.ledger import Ledger
from mimscale.observe.logbook import Logbook
from mimscale.observe.meter import Meter, Phases
from mimscale.observe.panels import SAMPLES
from mimscale.outbox import Outbox
from mimscale.prepare import Plan, open_ledger, prepare
from mimscale.recovery import Rig, describe_state, explain, restore, roll_back, settle_outbox
from mimscale.resilience import activations, checkpoint
from mimscale.resilience.control import Control
from mimscale.resilience.guard import Guard
from mimscale.resilience.lock import Lock
from mimscale.resilience.pace import BACKWARD, BETWEEN, FORWARD, SAVING, WAITING, Pace
from mimscale.resilience.preempt import Preemption, ignore_signals, leave_requeue_marker, there
from mimscale.resilience.saver import Saver
from mimscale.resilience.watchdog import Watchdog
from mimscale.state import TrainState
from mimscale.teachers.ahead import Lessons
from mimscale.teachers.bank import Bank


def train(plan: Plan, phases: Phases) -> None:
    """Run to the last step, or to the step at which a signal asks to stop. Saves at either."""
    run, world = plan.run, plan.world
    if (plan.run_dir / "done").exists():
        if world.rank == 0:
            print(f"{plan.run_dir} is finished; nothing to do", file=sys.stderr)
        return

    pace = Pace(world.device)
    watch = Watchdog(plan.run_dir, world.rank, run.watchdog, pace)
    preemption = Preemption(stop_files=run_folder.stop_files(plan.run_dir))
    torch.manual_seed(run.seed)
    method: Method = method_class(run.method.name)(run, plan.teachers)
    started = start.start_from(method, run) if plan.fresh and run.init is not None else ()
    bank = Bank(run.teachers, method.needs.teachers, run.data.image_size, world.device)
    phases.end("model")  # before the ranks connect: a missing teacher file is still one line
    lock = Lock(plan.run_dir) if world.rank == 0 else None
    phases.end("lock")
    open_process_group(world)
    watch.control = control = Control()
    phases.end("process_group")
    engine = Engine(method, run, world)
    bank.shard(partial(split_over_ranks, world=world))
    bank.check()
    method.begin(plan.manifest.samples)
    phases.end("engine")
    outbox = Outbox()
    logbook = Logbook(plan.run_dir, outbox, active=world.rank == 0)
    rig = Rig(plan, engine, method, bank, control, logbook, outbox)
    state = restore(rig, phases).launched()
    control.first(open_folder, rig, state)
    unchanged = lock.check if lock is not None else lambda: None
    saver = Saver(
        rig.checkpoints, control, run.checkpoint, rig.live_tensors(), unchanged, logbook.event, alive=watch.alive
    )
    guard = Guard(run.guard, engine.accumulation, world.device)
    guard.load(state.guard)
    phases.end("buffers")

    loader, lessons = open_lessons(rig, state)
    logbook.begin(total=plan.total_steps, step=state.step, tensorboard=run.log.tensorboard)
    logbook.say("\n".join((describe_run(plan, engine, state), *started)))
    ledger = open_ledger(run, plan.run_dir, plan.manifest, outbox if world.rank == 0 else None)
    pace.enter(WAITING)
    if state.step < plan.total_steps:
        lessons.fetch()  # the loop gets this batch again
    phases.end("workers")
    meter = Meter(world.device, waited_s=lambda: pace.seconds[WAITING])
    pace.lap()

    def judge(loss: Tensor) -> Tensor:
        pace.enter(BACKWARD)
        return guard.judge(loss)

    while state.step < plan.total_steps:
        engine.set_lr(plan.lr(state.step))
        engine.set_clip(guard.clip(run.optim.clip))
        ids = list[Tensor]()
        for _ in range(engine.accumulation):
            pace.enter(WAITING)
            raw = lessons.fetch()
            ids.append(raw.ids)
            pace.ids = ids  # not before there are any: who waits for data names those of the last step
            ledger.note(raw.damage)
            pace.enter(FORWARD)
            batch, targets = lessons.teach()
            meter.add(engine.micro_step(batch, targets, judge), images=len(batch.ids) * world.size)
        method.after_step(batch)
        state = state.advanced(run.schedule.global_batch, pace.lap())
        watch.beat(state.step)
        pace.enter(BETWEEN)

        if guard.due(state.step):
            guard.saw_norm(engine.gradient_norm())
        back = guard.look(engine.skipped, engine.loss_scale)
        if engine.skipped:
            explain(rig, guard, state.step, ids, batch, targets)
        if back:
            saver.settle()
            reached, state = state.step, roll_back(rig, guard, state)
            if state.step < reached:
                loader.close()
                loader, lessons = open_lessons(rig, state)
                meter.restart()
                continue

        last = state.step == plan.total_steps
        tell(rig, phases, pace, meter, ledger, state)
        if run.log.panels and (last or state.step % run.log.panels == 0):
            few = {name: seen.first(SAMPLES) for name, seen in targets.items()}
            logbook.show(state.step, method.look(batch.first(SAMPLES), few))
        stop = saver.follow(preemption.raised() or ledger.full) and not last
        if stop or last:
            pace.enter(SAVING)
            ignore_signals()
            saver.settle()
        if stop or last or (run.checkpoint.every and state.step % run.checkpoint.every == 0):
            list_damage(rig, ledger)  # a run that goes on from here does not meet it again
            save(rig, saver, guard, state, batch, targets)
        if stop:
            break

    end(rig, saver, ledger, preemption, state)
    loader.close()
    control.barrier()
    engine.close()
    close_process_group()
    watch.close()
    if lock is not None:
        lock.release()


def open_lessons(rig: Rig, state: TrainState) -> tuple[TrainLoader, Lessons]:
    """This rank's micro-batches from the state's step on, bare and with what the teachers saw; starts the workers."""
    plan, device = rig.plan, rig.plan.world.device
    loader = TrainLoader(
        plan.manifest,
        plan.run.data,
        rig.method.needs,
        seed=plan.run.seed,
        global_batch=plan.run.schedule.global_batch,
        micro_batch=rig.engine.micro_batch,
        rank=plan.world.rank,
        world=plan.world.size,
        start_step=state.step,
        jumps=state.jumps,
        pin=device.type == "cuda",
        device=device,
    )
    ahead = plan.run.engine.teachers_ahead
    return loader, Lessons(rig.bank, device, Staging(iter(loader), device), ahead=ahead, prepare=rig.method.prepare)


def tell(rig: Rig, phases: Phases, pace: Pace, meter: Meter, ledger: Ledger, state: TrainState) -> None:
    """What is due after a step: how long the first one took to come, who is slow, the log line. Collective."""
    plan, engine, logbook, step = rig.plan, rig.engine, rig.logbook, state.step
    if "first_step" not in phases.seconds:
        phases.end("first_step")
        logbook.event("first_step", seconds=phases.seconds, cpu_s=phases.cpu_s)
    if plan.run.watchdog.every and step % plan.run.watchdog.every == 0:
        for line in pace.compare(rig.control):
            logbook.say(line)
            logbook.event("spread", at=step, line=line)
    if step == plan.total_steps or step % plan.run.log.every == 0:
        metrics = meter.read()
        metrics |= {
            "lr": plan.lr(step - 1),
            "grad_norm": engine.gradient_norm(),
            "loss_scale": engine.loss_scale or 1.0,
        }
        metrics |= {"epoch": step / plan.steps_per_epoch, "skipped_steps": float(engine.skipped_steps)}
        list_damage(rig, ledger)
        logbook.step(step, metrics | {"damaged": float(ledger.total)})


def list_damage(rig: Rig, ledger: Ledger) -> None:
    """What any rank could not use since the last call goes into the run's list. Collective."""
    for damage in ledger.settle(rig.control.gather(ledger.take())):
        rig.logbook.event("damaged", **asdict(damage))
        rig.logbook.say(f"damaged: {damage.shard}, key {damage.key}: {damage.reason}; another sample took its place")


def save(rig: Rig, saver: Saver, guard: Guard, state: TrainState, batch: Batch, targets: Mapping[str, Targets]) -> None:
    """Begin a checkpoint. In fp16 the guard notes how large the layers' outputs are when all is well. Collective."""
    state = replace(state, guard=guard.dump())
    if rig.engine.loss_scale is not None:
        guard.usual = activations.magnitudes(rig.method, partial(rig.method, batch, targets))
    saver.save(state.step, rig.live_tensors(), describe_state(rig, state))


def end(rig: Rig, saver: Saver, ledger: Ledger, preemption: Preemption, state: TrainState) -> None:
    """Wait for the last save, and leave what says how the run ended: `done`, or a wish to run again. Collective.

    Raises Stopped where the last step could not be saved, or too many samples are damaged.
    """
    plan, logbook, saved = rig.plan, rig.logbook, saver.settle()
    newest, verdict = checkpoint.newest_step(plan.run_dir), None
    if state.step < plan.total_steps:
        reason = "too many damaged samples" if ledger.full else preemption.reason
        logbook.event("stopped", at=state.step, reason=reason)
        fate = "saved" if saved else f"NOT saved; {newest} is the newest"
        logbook.say(f"stopped at step {state.step} ({reason or 'asked by another rank'}), {fate}")
        if ledger.full:
            verdict = ledger.verdict()
        elif plan.world.rank == 0 and not there(run_folder.stop_wish(plan.run_dir)):
            leave_requeue_marker(rig.outbox, newest)
    elif not saved:
        verdict = f"the last checkpoint could not be written; {newest} is the newest"
    else:
        if plan.world.rank == 0:
            rig.outbox.replace(plan.run_dir / "done", f"{state.step}\n")
        logbook.say(f"done: {plan.run_dir}, step {state.step}")
    logbook.close()
    rig.control.settle()
    rig.control.first(settle_outbox, rig)
    if verdict is not None:
        raise Stopped(verdict)


def open_folder(rig: Rig, state: TrainState) -> None:
    """Rank 0: the configuration once, a line about this launch each time."""
    plan = rig.plan
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
    rig.outbox.append(plan.run_dir / "launches.jsonl", json.dumps(launch) + "\n")


def describe_run(plan: Plan, engine: Engine, state: TrainState) -> str:
    run, parameters = plan.run, sum(math.prod(shape) for shape in engine.layout.shapes().values())
    return (
        f"{run.method.name}: {parameters / 1e6:.1f} M parameters, {run.engine.ds_config}, {plan.world.size} ranks on "
        f"{plan.world.device.type}, batch {run.schedule.global_batch} = {engine.micro_batch} x {engine.accumulation} x "
        f"{plan.world.size}, peak lr {run.schedule.peak_lr:.3g}, {plan.manifest.samples} images, "
        f"step {state.step} of {plan.total_steps}, folder {plan.run_dir}"
        + ("" if run.data.stream is None else f"\n{NOTE}")
    )


# ------------------------------------------------------------------------------------------------ command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help=f"a recipe ({', '.join(recipe_names())}) or a path to a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    parser.add_argument("--run-dir", type=Path, help="the run's folder (default: runs/RECIPE); resumes what it holds")
    parser.add_argument("--fork", type=Path, metavar="NEW", help="start a new run in NEW from --run-dir's weights")


def run(args: argparse.Namespace) -> int:
    phases = Phases()
    phases.end("imports")
    config = load(args.recipe, args.overrides)
    run_dir = args.run_dir or Path("runs") / Path(args.recipe).stem
    plan = prepare(config, run_dir, args.fork, tuple(sys.argv))
    phases.end("checks")
    train(plan, phases)
    return 0
