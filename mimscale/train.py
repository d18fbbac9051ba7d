"""Pre-training: check -> build -> resume -> loop -> save. Read `train` from top to bottom; all else serves it.

One process per rank. Everything random comes in with the batch, so the sequence of batches, masks and drop paths is a
function of the step alone, whatever the number of ranks or workers and however often the run was stopped.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mimscale import run_folder, schedule
from mimscale.config import RunConfig, load, load_ds_config, method_class, precision_of, recipe_names, solve_batch
from mimscale.contracts import TeacherInfo
from mimscale.convert import start
from mimscale.data.cache import Cache
from mimscale.data.loader import TrainLoader
from mimscale.data.manifest import Manifest
from mimscale.engine.engine import Engine
from mimscale.engine.frozen import split_over_ranks
from mimscale.engine.world import World, check_precision, close_process_group, from_environment, open_process_group
from mimscale.errors import Stopped, UserError
from mimscale.methods.base import Method
from mimscale.observe.ledger import Ledger, default_limit
from mimscale.observe.logbook import Logbook
from mimscale.observe.meter import Meter, Phases
from mimscale.observe.panels import SAMPLES
from mimscale.resilience import checkpoint
from mimscale.resilience.control import Control
from mimscale.resilience.lock import Lock
from mimscale.resilience.preempt import Preemption, ignore_signals, leave_requeue_marker
from mimscale.resilience.saver import Saver
from mimscale.state import TrainState
from mimscale.teachers.bank import Bank, describe
from mimscale.teachers.quantise import check as check_quantised


@dataclass(frozen=True)
class Plan:
    """A run that passed every check that needs no other rank."""

    run: RunConfig
    run_dir: Path
    parent: Path | None  # the checkpoint whose weights a fork starts from
    fresh: bool  # whether there is no checkpoint of this run to go on from
    world: World
    manifest: Manifest
    teachers: Mapping[str, TeacherInfo]
    steps_per_epoch: int
    total_steps: int
    command: tuple[str, ...]

    def lr(self, step: int) -> float:
        return schedule.lr_of(self.run.schedule, step, self.steps_per_epoch, self.total_steps)


def prepare(run: RunConfig, run_dir: Path, fork: Path | None, command: tuple[str, ...]) -> Plan:
    """Every check, before a process group is opened. Raises UserError."""
    world = from_environment(run.engine.device)
    check_precision(world.device, precision_of(load_ds_config(run.engine.ds_config)))
    solve_batch(run.schedule.global_batch, world.size, run.engine.max_micro_batch)
    teachers = {name: describe(name, config, run.data.image_size) for name, config in run.teachers.items()}
    for name, teacher in run.teachers.items():
        if world.device.type == "cuda" or teacher.shard:
            check_precision(world.device, teacher.storage, f"teachers.{name}.precision")
            check_quantised(name, teacher.precision, world.device)
    method_class(run.method.name).check(run, teachers)

    stored = run_folder.existing_run(run_dir)
    parent = None
    if fork is not None:
        parent = checkpoint.newest(run_dir)
        if parent is None:
            raise UserError(f"--fork: {run_dir} has no checkpoint to start from; let it save one first")
        if run.init is not None:
            raise UserError(f"--fork starts from {run_dir} and init.weights from {run.init.weights}; set init=null")
        run_dir, stored = fork, run_folder.existing_run(fork)
    fresh = not checkpoint.steps(run_dir / "checkpoints") and not checkpoint.damaged(run_dir / "checkpoints")
    run = start.pinned(run, stored, resumes=not fresh)
    if stored is not None:
        run_folder.refuse_changes(stored, run, run_dir)
    if run_folder.stop_wish(run_dir).exists():
        raise UserError(f"{run_folder.stop_wish(run_dir)} asks this run to stop; remove it to go on")

    manifest = Manifest.load(run.data.shards, cache=Cache.of(run.data))
    steps_per_epoch = manifest.samples // run.schedule.global_batch
    if run.schedule.steps is None and steps_per_epoch == 0:
        raise UserError(
            f"schedule.global_batch = {run.schedule.global_batch} exceeds the {manifest.samples} samples of "
            f"{run.data.shards}; lower it, or give schedule.steps instead of schedule.epochs"
        )
    ledger = open_ledger(run, run_dir, manifest, writes=False)
    if ledger.full:
        raise UserError(ledger.verdict())
    total = run.schedule.steps or round((run.schedule.epochs or 0) * steps_per_epoch)
    steps_per_epoch = max(1, steps_per_epoch)
    if total <= run.schedule.warmup_epochs * steps_per_epoch:
        raise UserError(
            f"the run has {total} steps and a warm-up of schedule.warmup_epochs = {run.schedule.warmup_epochs} "
            f"({run.schedule.warmup_epochs * steps_per_epoch:g} steps); lengthen the one or shorten the other"
        )
    return Plan(run, run_dir, parent, fresh, world, manifest, teachers, steps_per_epoch, total, command)


def train(plan: Plan, phases: Phases) -> None:
    """Run to the last step, or to the step at which a signal asks to stop. Saves at either."""
    run, world = plan.run, plan.world
    if (plan.run_dir / "done").exists():
        if world.rank == 0:
            print(f"{plan.run_dir} is finished; nothing to do", file=sys.stderr)
        return

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
        control = Control()
    with phases("engine"):
        engine = Engine(method, run, world)
        bank.shard(partial(split_over_ranks, world=world))
        method.begin(plan.manifest.samples)
    with phases("resume"):
        state = restore(plan, engine, method, bank, control).launched()
        control.first(open_folder, plan, state)
        root, unchanged = plan.run_dir / "checkpoints", lock.check if lock is not None else lambda: None
        saver = Saver(root, control, run.checkpoint, live_tensors(engine, method), unchanged)

    loader = TrainLoader(
        plan.manifest,
        run.data,
        needs,
        seed=run.seed,
        global_batch=run.schedule.global_batch,
        micro_batch=engine.micro_batch,
        rank=world.rank,
        world=world.size,
        start_step=state.step,
        pin=world.device.type == "cuda",
    )
    batches = iter(loader)  # starts the workers, before this process has threads of its own
    logbook = Logbook(
        plan.run_dir,
        active=world.rank == 0,
        tensorboard=run.log.tensorboard,
        total=plan.total_steps,
        step=state.step,
    )
    saver.note = logbook.event
    logbook.say("\n".join((describe_run(plan, engine, state), *started)))
    meter = Meter(world.device)
    ledger = open_ledger(run, plan.run_dir, plan.manifest, writes=world.rank == 0)
    saved_step = state.step if state.launches > 1 else -1
    loop_start_s = step_start_s = time.perf_counter()

    while state.step < plan.total_steps:
        lr = plan.lr(state.step)
        engine.set_lr(lr)
        for _ in range(engine.accumulation):
            with meter.waiting():
                batch = next(batches)
            ledger.note(batch.damage)
            batch = method.prepare(batch).to(world.device).normalised()
            targets = bank(batch.images)
            meter.add(engine.micro_step(batch, targets), images=len(batch.ids) * world.size)
        method.after_step(batch)

        now_s = time.perf_counter()
        state, step_start_s = state.advanced(run.schedule.global_batch, now_s - step_start_s), now_s
        if "first_step" not in phases.seconds:
            phases.seconds["first_step"] = round(now_s - loop_start_s, 3)
            logbook.event("first_step", seconds=phases.seconds)

        last = state.step == plan.total_steps
        if last or state.step % run.log.every == 0:
            metrics = meter.read()
            metrics |= {"lr": lr, "grad_norm": engine.gradient_norm(), "loss_scale": engine.loss_scale}
            metrics |= {"epoch": state.step / plan.steps_per_epoch, "skipped_steps": float(engine.skipped_steps)}
            for damage in ledger.settle(control.gather(ledger.take())):
                logbook.event("damaged", **asdict(damage))
                logbook.say(
                    f"damaged: {damage.shard}, key {damage.key}: {damage.reason}; another sample took its place"
                )
            logbook.step(state.step, metrics | {"damaged": float(ledger.total)})
        if run.log.panels and (last or state.step % run.log.panels == 0):
            targets = {name: seen.first(SAMPLES) for name, seen in targets.items()}
            logbook.show(state.step, method.look(batch.first(SAMPLES), targets))
        raised, *saved = control.agree(preemption.raised() or ledger.full, *saver.votes())
        saver.follow(*saved)
        stop = bool(raised) and not last
        if stop or last:
            ignore_signals()
            saver.settle()
        if stop or last or (run.checkpoint.every and state.step % run.checkpoint.every == 0):
            if state.step != saved_step:
                saver.save(state.step, live_tensors(engine, method), describe_state(plan, engine, method, bank, state))
            saved_step = state.step
        if stop:
            saver.settle()
            reason = "too many damaged samples" if ledger.full else preemption.reason
            logbook.event("stopped", at=state.step, reason=reason)
            logbook.say(f"stopped at step {state.step} ({reason or 'asked by another rank'}), saved")
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
    if lock is not None:
        lock.release()


# ------------------------------------------------------------------------------------------------ saving and resuming


def restore(plan: Plan, engine: Engine, method: Method, bank: Bank, control: Control) -> TrainState:
    """Continue from the newest checkpoint that is whole, else from a fork's parent, else from the beginning."""
    root = plan.run_dir / "checkpoints"
    for path in reversed(control.broadcast(checkpoint.steps(root))):
        reader, damage = control.together(opened, path, control)
        wrong = [text for text in control.gather(damage) if text]
        if reader is None or wrong:
            if control.rank == 0:
                print(f"passing over {path.name}: {wrong[0]}", file=sys.stderr)
            control.first(checkpoint.set_aside, path)
            continue
        refuse_other_inputs(reader, plan, bank)
        control.together(engine.load, reader)
        engine.finish_load(reader)
        control.together(reader.fill, method.live_tensors())
        method.load_extra_state(reader.meta["method"])
        state = TrainState.load(reader.meta["state"])
        if state.samples != state.step * plan.run.schedule.global_batch:
            raise UserError(f"{path}: {state.samples} samples are not {state.step} steps of the global batch")
        return state
    if control.broadcast(checkpoint.damaged(root)):
        raise UserError(f"every checkpoint in {root} is damaged; remove the damaged-* folders to start at step 0")
    if plan.parent is not None:
        reader = checkpoint.Reader(plan.parent)
        control.together(engine.load_weights, reader)
        engine.finish_load(reader, counters=False)
    return TrainState()


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


def live_tensors(engine: Engine, method: Method) -> dict[str, torch.Tensor]:
    """This rank's part of a checkpoint: the engine's masters and moments, and what the method learned between steps."""
    return {**engine.live_tensors(), **method.live_tensors()}


def describe_state(plan: Plan, engine: Engine, method: Method, bank: Bank, state: TrainState) -> dict[str, Any]:
    """What a checkpoint's manifest says besides where the tensors are."""
    return {
        "step": state.step,
        "state": state.dump(),
        "config": plan.run.dump(),
        "data": plan.manifest.fingerprint,
        "teachers": bank.identities(),
        "method": method.extra_state(),
        **engine.meta(),
    }


def open_ledger(run: RunConfig, run_dir: Path, manifest: Manifest, writes: bool) -> Ledger:
    limit = run.data.max_damaged
    return Ledger(run_dir / "damaged.jsonl", default_limit(manifest.samples) if limit is None else limit, writes)


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
