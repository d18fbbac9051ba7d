"""What a scheduler asks for, at bad moments, and a clock that is wrong."""

from __future__ import annotations

import signal
import time

from tests.faults.kinds._kind import Moments, fault, soon
from tests.faults.lab import STEPS, Lab, Missed, Run
from tests.faults.layer import SLOW


def stopped(run: Run) -> None:
    """Raises Missed unless the run saved and left because of the signal."""
    run.end(patience_s=60.0)
    if not any(event["reason"] in ("SIGUSR1", None) for event in run.events("stopped")):
        raise Missed("the signal did not stop the run")


@fault(times=10)
def usr1(lab: Lab, run: Run, number: int) -> Moments:
    step = soon(lab, run)
    run.mark()
    run.kill(signal.SIGUSR1)
    stopped(run)
    yield f"step {step}"


@fault(times=6)
def usr1_at_start_up(lab: Lab, run: Run, number: int) -> Moments:
    """Before the first step. One that comes before its handler is ignored, as the batch script arranges."""
    run.down()
    wait_s = 0.1 + 0.15 * (number % 6)
    while True:
        run.mark()
        run.start()
        time.sleep(wait_s)
        if run.alive() and not run.steps():
            break
        run.down()
        wait_s /= 2
    run.kill(signal.SIGUSR1)
    run.until(lambda: run.events("stopped") or len(run.steps()) > 2, "an answer")
    early = not run.events("stopped")
    if not early:
        stopped(run)
    yield f"after {wait_s:.2f} s{', before its handler' if early else ''}"


@fault(times=6)
def usr1_inside_a_save(lab: Lab, run: Run, number: int) -> Moments:
    lab.layer.arm("s", run.checkpoints, SLOW, delay_ms=200)
    run.until(lambda: lab.layer.struck, "a save")
    run.kill(signal.SIGUSR1)
    stopped(run)
    lab.layer.rest()
    yield f"step {run.step()}"


@fault(times=4, last=True)
def usr1_at_the_end(lab: Lab, run: Run, number: int) -> Moments:
    """While the last checkpoint is being written."""
    run.until_step(STEPS - 2)
    lab.layer.arm("s", run.checkpoints, SLOW, delay_ms=200)
    run.until_step(STEPS)
    if not run.alive() or run.done:
        raise Missed("the run was over")
    run.kill(signal.SIGUSR1)
    run.end(patience_s=60.0)
    lab.layer.rest()
    yield "while the last checkpoint is written"
    if not run.done:
        raise Missed("the run did not end as done")


@fault(times=4)
def requeue_storm(lab: Lab, run: Run, number: int) -> Moments:
    """Five starts in a row that are stopped after a step or two."""
    for turn in range(5):
        run.mark()
        if turn:
            run.start()
            run.until(run.steps, "a step")
        run.kill(signal.SIGUSR1)
        stopped(run)
    yield "five times"


@fault(times=6)
def clock_jumps(lab: Lab, run: Run, number: int) -> Moments:
    """By a day, forth or back, in mid-run; the restart sees the wrong clock too."""
    step, seconds = soon(lab, run), 86400 * (-1) ** number
    try:
        run.mark()
        lab.layer.shift_clock(seconds)
        run.until(
            lambda: any(abs(event["time"] - time.time() - seconds) < 3600 for event in run.events("saved")),
            "a save under the wrong time",
        )
        run.down()
        yield f"step {step}, {seconds // 3600:+d} h"
    finally:
        lab.layer.shift_clock(0)
