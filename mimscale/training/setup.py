"""Build the parts of a run, one after the other. What can fail without the other ranks fails before they connect.

What needs them is built once all have met, agree on what they train, and see one run folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mimscale.checkpoint import run_folder
from mimscale.config.deepspeed import precision_of
from mimscale.config.run import RunConfig, method_class
from mimscale.distributed.coordination import Coordinator, Opening
from mimscale.distributed.rendezvous import meet, while_meeting
from mimscale.distributed.world import World
from mimscale.engine.base import Engine
from mimscale.engine.factory import make_engine, open_process_group
from mimscale.engine.sharded_module import split_over_ranks
from mimscale.fault_tolerance.preemption import Preemption, SignalWatch
from mimscale.fault_tolerance.retrying_writer import RetryingWriter
from mimscale.fault_tolerance.run_lock import RunLock
from mimscale.fault_tolerance.step_guard import StepGuard
from mimscale.fault_tolerance.watchdog import Watchdog
from mimscale.methods.base import Method
from mimscale.monitoring.metrics import StartupTimer
from mimscale.monitoring.phase_timer import PhaseTimer
from mimscale.monitoring.run_logger import RunLogger
from mimscale.teachers.ensemble import TeacherEnsemble
from mimscale.training import init_weights
from mimscale.training.auto_micro_batch import agreed
from mimscale.training.checked_run import CheckedRun, open_damage_log
from mimscale.training.context import TrainContext
from mimscale.training.inputs import TrainInputs
from mimscale.training.same_ranks import refuse_different_ranks
from mimscale.training.speed import step_cost
from mimscale.types import TeacherInfo

if TYPE_CHECKING:
    from mimscale.evals.top1_training import Top1Evaluator
    from mimscale.evals.while_training import Evaluator


def build(checked: CheckedRun, startup: StartupTimer, closing: ExitStack) -> TrainContext:
    """Method, teachers, engine, inputs, and what watches them. Collective from the process group on.

    closing: gets what is to be ended after the run.
    """
    config, world = checked.config, checked.world
    timer = PhaseTimer(world.device)
    watchdog = Watchdog(checked.run_dir, world.rank, config.watchdog, timer)
    closing.callback(watchdog.close)
    preemption = Preemption(stop_files=run_folder.stop_files(checked.run_dir))
    signal_watch = SignalWatch(preemption, world.rank)
    closing.callback(signal_watch.close)

    method = make_method(config, checked.teachers)
    init_notes = init_weights.load_into(method, config) if checked.fresh and config.init is not None else ()
    needs, image_size = method.needs.teachers, config.data.image_size
    fused = config.engine.uses("teacher_kernels")
    teachers = TeacherEnsemble(config.teachers, checked.skeletons, needs, image_size, world.device, fused)
    cost, cost_notes = step_cost(checked)
    parameter_count = sum(parameter.numel() for parameter in method.parameters())
    startup.end("model")

    lock = RunLock(checked.run_dir) if world.rank == 0 else None
    if lock is not None:
        closing.callback(lock.release)
    startup.end("lock")
    store = meet(world, preemption.leave_if_asked)
    signal_watch.coordinator = Opening(store, world.rank, world.size)
    with while_meeting(world):
        open_process_group(world, config.engine)
        watchdog.coordinator = signal_watch.coordinator = coordinator = Coordinator(store)
        checked = agreed(checked, coordinator)
        config = checked.config
        refuse_different_ranks(checked, teachers, coordinator)
        run_folder.prove_shared(checked.run_dir, coordinator)
    evaluator, top1 = make_evaluator(checked, method, coordinator), make_top1(checked, method, coordinator)
    startup.end("process_group")

    engine = connect(
        method,
        teachers,
        config,
        world,
        micro_batch=checked.micro_batch,
        accumulation=checked.accumulation,
        ds_config=checked.ds_config,
        samples=checked.manifest.samples,
    )
    startup.end("engine")

    writer = RetryingWriter()
    damage_log = open_damage_log(config, checked.run_dir, checked.manifest, writer if world.rank == 0 else None)
    inputs = TrainInputs(checked, method, teachers, timer, damage_log)
    closing.callback(inputs.close)
    return TrainContext(
        checked=checked,
        method=method,
        teachers=teachers,
        engine=engine,
        inputs=inputs,
        guard=StepGuard(config.guard, checked.accumulation, world.device),
        coordinator=coordinator,
        logger=RunLogger(checked.run_dir, writer, active=world.rank == 0),
        writer=writer,
        damage_log=damage_log,
        startup=startup,
        timer=timer,
        watchdog=watchdog,
        preemption=preemption,
        lock=lock,
        closing=closing,
        parameter_count=parameter_count,
        init_notes=init_notes,
        cost=cost,
        cost_notes=cost_notes,
        evaluator=evaluator,
        top1=top1,
    )


def make_method(config: RunConfig, teachers: Mapping[str, TeacherInfo]) -> Method:
    """The method on the CPU, at the random start that the recipe's seed gives. Raises UserError."""
    torch.manual_seed(config.seed)
    method: Method = method_class(config.method.name)(config, teachers)
    return method


def make_evaluator(checked: CheckedRun, method: Method, coordinator: Coordinator) -> Evaluator | None:
    """What evaluates the student while it trains, before the engine gets the method. Raises UserError."""
    if checked.evals is None:
        return None
    from mimscale.evals.while_training import Evaluator

    return Evaluator(checked.evals, method.student, checked.world, coordinator, precision_of(checked.ds_config))


def make_top1(checked: CheckedRun, method: Method, coordinator: Coordinator) -> Top1Evaluator | None:
    """What measures a classifier while it trains, before the engine gets the method."""
    if checked.evals is None or checked.evals.config.top1_epochs is None:
        return None
    from mimscale.evals.top1_training import Top1Evaluator

    val, precision = checked.evals.val.manifest, precision_of(checked.ds_config)
    return Top1Evaluator(checked.config, method, val, checked.steps_per_epoch, checked.world, coordinator, precision)


def connect(
    method: Method,
    teachers: TeacherEnsemble,
    config: RunConfig,
    world: World,
    *,
    micro_batch: int,
    accumulation: int,
    ds_config: Mapping[str, Any],
    samples: int,
) -> Engine:
    """The engine around a method, with the teachers ready beside it. Collective. Raises UserError. samples: in the data
    set.
    """
    engine = make_engine(method, config, world, micro_batch=micro_batch, accumulation=accumulation, ds_config=ds_config)
    teachers.shard(partial(split_over_ranks, world=world))
    teachers.check()
    if config.engine.cuda_graphs != "off":
        teachers.use_cuda_graphs()
    method.before_run(samples)
    return engine
