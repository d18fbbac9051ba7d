"""Pre-training: build -> resume -> train step after step -> save. Read `train` and `train_step` first.

One process per rank. Everything random comes in with the batch, so the sequence of batches, masks and drop paths is a
function of the step alone, whatever the number of ranks or workers and however often the run was stopped.
"""

from __future__ import annotations

from contextlib import ExitStack

from mimscale.errors import warn
from mimscale.monitoring.metrics import StartupTimer
from mimscale.training import recovery, setup
from mimscale.training.checked_run import CheckedRun
from mimscale.training.context import TrainContext
from mimscale.training.monitor import Monitor
from mimscale.training.out_of_memory import explained
from mimscale.types import StepInfo


def train(checked: CheckedRun, startup: StartupTimer, closing: ExitStack) -> bool:
    """Run to the last step, or to the step at which a signal asks to stop. Saves at either.

    Returns whether somebody's Ctrl-C ended it.

    closing: gets what is to be ended afterwards: watchdog, lock, workers. A process that ends because the run failed
    leaves it alone, so that it stays watched. The process group stays open for another run in this process.
    """
    if (checked.run_dir / "done").exists():
        if checked.world.rank == 0:
            warn(f"{checked.run_dir} is finished; nothing to do")
        return False
    with explained(checked):  # of an error of memory: the micro-batch that would fit
        run = setup.build(checked, startup, closing)
        state = recovery.restore(run).launched()
        monitor = Monitor(run, state)
        while state.step < checked.total_steps and not monitor.stopped:
            info = train_step(run, state.step)
            run.method.after_step(info)
            state = monitor.after_step(state, info)
        monitor.finish(state)
    return monitor.stopped and run.preemption.reason == "SIGINT"


def train_step(run: TrainContext, step: int) -> StepInfo:
    """One optimiser step on the global batch number `step`, from 0: micro-batches, then the update. Collective.

    The gradient is that of the mean loss over all micro-batches of all ranks.
    """
    checked, scalars = run.checked, []
    for _ in range(checked.accumulation):
        batch, targets = run.inputs.next_batch()
        scalars.append(run.engine.forward_backward(batch, targets, run.check_loss))
    skipped = run.engine.step(lr=checked.lr(step), clip=run.guard.clip(checked.config.optim.clip))
    return StepInfo(step + 1, checked.total_steps, skipped, tuple(scalars), batch, targets, run.engine.parameters)
