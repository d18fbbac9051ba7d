"""Pre-training: check -> build -> resume -> loop -> save. Read `train` from top to bottom; all else serves it.

One process per rank. Everything random comes in with the batch, so the sequence of batches, masks and drop paths is a
function of the step alone, whatever the number of ranks or workers and however often the run was stopped.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mimscale import run_folder
from mimscale.config import load, method_class, recipe_names
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
from mimscale.prepare import Plan, open_ledger, prepare
from mimscale.recovery import Rig, describe_state, explain, restore, roll_back
from mimscale.resilience import activations, checkpoint
from mimscale.resilience.control import Control
from mimscale.resilience.guard import Guard
from mimscale.resilience.lock import Lock
from mimscale.resilience.preempt import Preemption, ignore_signals, leave_requeue_marker
from mimscale.resilience.saver import Saver
from mimscale.resilience.watchdog import Spread, Watchdog
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

    watch = Watchdog(plan.run_dir, world.rank, run.watchdog)
    preemption = Preemption(stop_files=run_folder.stop_files(plan.run_dir))
    with phases("model"):  # before the ranks connect: a missing teacher file is still one line
        torch.manual_seed(run.seed)
        method: Method = method_class(run.method.name)(run, plan.teachers)
        needs = method.needs
        started = start.start_from(method, run) if plan.fresh and run.init is not None else ()
        bank = Bank(run.teachers, needs.teachers, run.data.image_size, world.device)
    lock = Lock(plan.run_dir) if world.rank == 0 else None
    with phases("process_group"):
        open_process_group(world)
        watch.control = control = Control()
    with phases("engine"):
        engine = Engine(method, run, world)
        bank.shard(partial(split_over_ranks, world=world))
        method.begin(plan.manifest.samples)
    with phases("resume"):
        rig = Rig(plan, engine, method, bank, control)
        state = restore(rig).launched()
        control.first(open_folder, plan, state)
        unchanged = lock.check if lock is not None else lambda: None
        saver = Saver(rig.checkpoints, control, run.checkpoint, rig.live_tensors(), unchanged)
        guard = Guard(run.guard, engine.accumulation, world.device)
        guard.load(state.guard)

    loader = open_loader(plan, method, engine, state)
    taught = partial(Lessons, bank, world.device, ahead=run.engine.teachers_ahead, prepare=method.prepare)
    lessons = taught(Staging(iter(loader), world.device))  # starts the workers
    logbook = Logbook(
        plan.run_dir,
        active=world.rank == 0,
        tensorboard=run.log.tensorboard,
        total=plan.total_steps,
        step=state.step,
    )
    saver.note = logbook.event
    logbook.say("\n".join((describe_run(plan, engine, state), *started)))
    meter, spread = Meter(world.device), Spread(control, run.watchdog.every, world.device)
    ledger = open_ledger(run, plan.run_dir, plan.manifest, writes=world.rank == 0)

    def judge(loss: Tensor) -> Tensor:
        spread.forwarded()
        watch.phase = "backward pass and step"
        return guard.judge(loss)

    loop_start_s = step_start_s = time.perf_counter()

    while state.step < plan.total_steps:
        lr, skips_before = plan.lr(state.step), engine.skipped_steps
        ids = list[Tensor]()
        engine.set_lr(lr)
        engine.set_clip(guard.clip(run.optim.clip))
        for _ in range(engine.accumulation):
            watch.phase = "waiting for data"
            with meter.waiting():
                raw = lessons.fetch()
            spread.waited()
            watch.phase = "forward pass"
            ids.append(raw.ids)
            watch.ids = ids
            ledger.note(raw.damage)
            batch, targets = lessons.teach()
            meter.add(engine.micro_step(batch, targets, judge), images=len(batch.ids) * world.size)
            spread.stepped()
        method.after_step(batch)

        now_s = time.perf_counter()
        state, step_start_s = state.advanced(run.schedule.global_batch, now_s - step_start_s), now_s
        if "first_step" not in phases.seconds:
            phases.seconds["first_step"] = round(now_s - loop_start_s, 3)
            logbook.event("first_step", seconds=phases.seconds)

        watch.beat(state.step)
        watch.phase = "between steps"
        for line in spread.compare(state.step):
            logbook.say(line)
            logbook.event("spread", at=state.step, line=line)
        if guard.due(state.step):
            guard.saw_norm(engine.gradient_norm())
        skipped = engine.skipped_steps > skips_before
        back = guard.look(skipped, engine.loss_scale)
        if skipped:
            explain(rig, guard, logbook, state.step, ids, batch, targets)
        if back:
            saver.settle()
            state = roll_back(rig, guard, logbook, state)
            loader.close()
            loader = open_loader(plan, method, engine, state)
            lessons = taught(Staging(iter(loader), world.device))
            meter = Meter(world.device)
            continue

        last = state.step == plan.total_steps
        if last or state.step % run.log.every == 0:
            metrics = meter.read()
            metrics |= {"lr": lr, "grad_norm": engine.gradient_norm(), "loss_scale": engine.loss_scale or 1.0}
            metrics |= {"epoch": state.step / plan.steps_per_epoch, "skipped_steps": float(engine.skipped_steps)}
            list_damage(ledger, control, logbook)
            logbook.step(state.step, metrics | {"damaged": float(ledger.total)})
        if run.log.panels and (last or state.step % run.log.panels == 0):
            few = {name: seen.first(SAMPLES) for name, seen in targets.items()}
            logbook.show(state.step, method.look(batch.first(SAMPLES), few))
        raised, *saved = control.agree(preemption.raised() or ledger.full, *saver.votes())
        saver.follow(*saved)
        stop = bool(raised) and not last
        if stop or last:
            ignore_signals()
            saver.settle()
        if stop or last or (run.checkpoint.every and state.step % run.checkpoint.every == 0):
            list_damage(ledger, control, logbook)  # a run that goes on from here does not meet it again
            state = replace(state, guard=guard.dump())
            if engine.loss_scale is not None:
                guard.usual = activations.magnitudes(method, partial(method, batch, targets))
            saver.save(state.step, rig.live_tensors(), describe_state(rig, state))
        if stop:
            fate = "saved" if saver.settle() else f"NOT saved; {checkpoint.newest_step(plan.run_dir)} is the newest"
            reason = "too many damaged samples" if ledger.full else preemption.reason
            logbook.event("stopped", at=state.step, reason=reason)
            logbook.say(f"stopped at step {state.step} ({reason or 'asked by another rank'}), {fate}")
            if ledger.full:
                raise Stopped(ledger.verdict())
            if world.rank == 0 and not run_folder.stop_wish(plan.run_dir).exists():
                leave_requeue_marker(checkpoint.newest_step(plan.run_dir))
            break
    else:
        if not saver.settle():
            raise Stopped(
                f"the last checkpoint could not be written; {checkpoint.newest_step(plan.run_dir)} is the newest"
            )
        control.first(run_folder.mark_done, plan.run_dir, state.step)
        logbook.say(f"done: {plan.run_dir}, step {state.step}")

    control.settle()
    logbook.close()
    loader.close()
    control.barrier()
    engine.close()
    close_process_group()
    watch.close()
    if lock is not None:
        lock.release()


def list_damage(ledger: Ledger, control: Control, logbook: Logbook) -> None:
    """What any rank could not use since the last call goes into the run's list. All ranks call it together."""
    for damage in ledger.settle(control.gather(ledger.take())):
        logbook.event("damaged", **asdict(damage))
        logbook.say(f"damaged: {damage.shard}, key {damage.key}: {damage.reason}; another sample took its place")


def open_loader(plan: Plan, method: Method, engine: Engine, state: TrainState) -> TrainLoader:
    """This rank's micro-batches from the state's step on."""
    return TrainLoader(
        plan.manifest,
        plan.run.data,
        method.needs,
        seed=plan.run.seed,
        global_batch=plan.run.schedule.global_batch,
        micro_batch=engine.micro_batch,
        rank=plan.world.rank,
        world=plan.world.size,
        start_step=state.step,
        jumps=state.jumps,
        pin=plan.world.device.type == "cuda",
    )


def open_folder(plan: Plan, state: TrainState) -> None:
    """Rank 0: the configuration once, a line about this launch each time."""
    if not (plan.run_dir / "config.yaml").exists():
        run_folder.create(plan.run_dir, plan.run)
    run_folder.record_launch(
        plan.run_dir,
        plan.command,
        ranks=plan.world.size,
        device=str(plan.world.device.type),
        ds_config=plan.run.engine.ds_config,
        step=state.step,
        forked_from=None if plan.parent is None else str(plan.parent),
    )


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
    with phases("checks"):
        config = load(args.recipe, args.overrides)
        run_dir = args.run_dir or Path("runs") / Path(args.recipe).stem
        plan = prepare(config, run_dir, args.fork, tuple(sys.argv))
    train(plan, phases)
    return 0
