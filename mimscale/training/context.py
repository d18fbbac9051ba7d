"""The parts of a run, made by `setup.build` and handed to everything that takes part in it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from mimscale.distributed.coordination import Coordinator
from mimscale.engine.base import Engine
from mimscale.fault_tolerance.preemption import Preemption
from mimscale.fault_tolerance.retrying_writer import RetryingWriter
from mimscale.fault_tolerance.run_lock import RunLock
from mimscale.fault_tolerance.step_guard import StepGuard
from mimscale.fault_tolerance.watchdog import Watchdog
from mimscale.methods.base import Method
from mimscale.monitoring.damage_log import DamageLog
from mimscale.monitoring.metrics import StartupTimer, StepCost
from mimscale.monitoring.phase_timer import BACKWARD, PhaseTimer
from mimscale.monitoring.run_logger import RunLogger
from mimscale.teachers.ensemble import TeacherEnsemble
from mimscale.training.checked_run import CheckedRun
from mimscale.training.inputs import TrainInputs

if TYPE_CHECKING:
    from mimscale.evals.top1_training import Top1Evaluator
    from mimscale.evals.while_training import Evaluator


@dataclass(frozen=True)
class TrainContext:
    """What is trained: method, teachers, engine, inputs. What watches it: the rest.

    lock: on rank 0. closing: what is ended after the run. init_notes: a line for each thing that `init.weights` filled,
    resized or left. cost, cost_notes: FLOPs and the device's peak, and the lines that say them. evaluator:
    of the section `evals`; top1: of its accuracy of a classifier.
    """

    checked: CheckedRun
    method: Method
    teachers: TeacherEnsemble
    engine: Engine
    inputs: TrainInputs
    guard: StepGuard
    coordinator: Coordinator
    logger: RunLogger
    writer: RetryingWriter
    damage_log: DamageLog
    startup: StartupTimer
    timer: PhaseTimer
    watchdog: Watchdog
    preemption: Preemption
    lock: RunLock | None
    closing: ExitStack
    parameter_count: int
    init_notes: tuple[str, ...] = ()
    cost: StepCost = StepCost()
    cost_notes: tuple[str, ...] = ()
    evaluator: Evaluator | None = None
    top1: Top1Evaluator | None = None

    @property
    def checkpoints(self) -> Path:
        return self.checked.run_dir / "checkpoints"

    def fragments(self) -> dict[str, Tensor]:
        """This rank's part of a checkpoint: weights, optimiser state, and what the method learned between steps."""
        return {**self.engine.fragments(), **self.method.fragments()}

    def check_loss(self, loss: Tensor) -> Tensor:
        """Between forward and backward: the loss, or NaN where the step must not reach the weights. Collective."""
        self.timer.enter(BACKWARD)
        return self.guard.check_loss(loss)
