"""Processes that die or stand still."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from mimscale.data.datasets import TrainDataset
from tests.faults.kinds._kind import Moments, fault, soon
from tests.faults.lab import Lab, Missed, Run
from tests.faults.layer import KILL

MOMENTS = 20
OPERATIONS = {"o": "open", "w": "write", "s": "fsync", "m": "mkdir", "r": "rename", "u": "unlink"}


def was_killed(run: Run, which: list[int]) -> None:
    """Raises Missed unless SIGKILL ended these ranks before the run was done."""
    run.end()
    if run.done or any(run.statuses[pid] != -signal.SIGKILL for pid in which):
        raise Missed("the run was done, or not killed")


def kill_ranks(lab: Lab, run: Run, ranks: list[int]) -> str:
    step = soon(lab, run)
    struck = [run.pids[rank] for rank in ranks]
    run.kill(which=struck)
    was_killed(run, struck)
    return f"step {step}"


@fault(times=20, worlds=(1,))
def kill_trainer(lab: Lab, run: Run, number: int) -> Moments:
    yield kill_ranks(lab, run, [0])


@fault(times=6, worlds=(2,))
def kill_rank_0(lab: Lab, run: Run, number: int) -> Moments:
    yield kill_ranks(lab, run, [0])


@fault(times=8, worlds=(2,))
def dead_peer(lab: Lab, run: Run, number: int) -> Moments:
    """Rank 1 is killed; the other's collective fails, and it leaves."""
    yield kill_ranks(lab, run, [1])


@fault(times=10, worlds=(2,))
def kill_all_ranks(lab: Lab, run: Run, number: int) -> Moments:
    yield kill_ranks(lab, run, [0, 1])


@fault(times=8)
def kill_loader_worker(lab: Lab, run: Run, number: int) -> Moments:
    step = soon(lab, run)
    run.kill(which=run.workers()[:1])
    run.end()
    if run.done or not run.said("DataLoader worker"):
        raise Missed("the loss of a worker ended nothing")
    yield f"step {step}"


@fault(times=4, worlds=(1,))
def worker_out_of_memory(lab: Lab, run: Run, number: int) -> Moments:
    """The kernel's own killer, by a memory limit of the worker's control group where one may be made."""
    run.down()
    wish = run.folder.with_name(f"{run.folder.name}-{number}.hungry")
    run.plant = partial(plant_hunger, wish)
    run.mark()
    run.start()
    run.until(run.steps, "a step")
    run.plant = lambda: None
    step = soon(lab, run)
    (worker,) = run.workers()
    group = _starved_group(worker)
    wish.touch()
    if group is None:
        run.kill(which=[worker])
    run.end()
    if group is not None:
        killed = _killed_in(group)
        with suppress(OSError):
            group.rmdir()
        if not killed:
            raise Missed("the kernel killed nothing")
    if run.done or not run.said("DataLoader worker"):
        raise Missed("the loss of a worker ended nothing")
    yield f"step {step}, {'by SIGKILL as the kernel would' if group is None else 'by the kernel'}"


def plant_hunger(wish: Path) -> None:
    """A worker takes 64 MiB for its next batch once the file is there."""
    make = TrainDataset.__getitem__

    def hungry(self: TrainDataset, item: Any) -> Any:
        self.eaten = b"\1" * (64 << 20 if wish.exists() else 0)  # type: ignore[attr-defined]
        return make(self, item)

    TrainDataset.__getitem__ = hungry  # type: ignore[method-assign]


def _starved_group(pid: int) -> Path | None:
    """Move a process to a control group without memory to spare; None where that is not permitted."""
    name = f"mimscale-fault-{pid}"
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root, name)
        try:
            group.mkdir(exist_ok=True)
            (group / limit).write_text(str(64 << 10))
            (group / "cgroup.procs").write_text(str(pid))
            return group
        except OSError:
            with suppress(OSError):
                group.rmdir()
    return None


def _killed_in(group: Path) -> bool:
    for name in ("memory.oom_control", "memory.events"):
        with suppress(OSError):
            counts = dict(line.split() for line in (group / name).read_text().splitlines())
            return int(counts["oom_kill"]) > 0
    return False


@fault(times=MOMENTS, worlds=(1,))
def kill_inside_a_save(lab: Lab, run: Run, number: int) -> Moments:
    """At evenly spaced places among the file operations of a save: half a write is on disk, a rename is not done."""
    run.until(lambda: run.events("saved"), "a save")  # so that the next operation is the first of the next save
    at = number % MOMENTS * len(lab.save_ops) // MOMENTS
    lab.layer.arm("owsmru", run.checkpoints, KILL, skip=at)
    (trainer,) = run.pids
    run.end(patience_s=60.0)
    trace = lab.layer.trace
    if lab.layer.rest() != 1:
        raise Missed("there was no such operation")
    was_killed(run, [trainer])
    yield f"{at + 1} {OPERATIONS[trace[at]]}"


@fault(times=2, worlds=(2,))
def hung_rank(lab: Lab, run: Run, number: int) -> Moments:
    """Rank 1 stands still: the watchdog of the other writes down where, and ends it."""
    run.down()
    run.overrides = ("watchdog.stall_s=6",)
    run.mark()
    run.start()
    run.until(run.steps, "a step")
    soon(lab, run)
    run.mark()
    run.kill(signal.SIGSTOP, [run.pids[1]])
    barked = run.pids[0]
    end_s = time.monotonic() + 60.0
    while run.alive() and barked not in run.statuses and time.monotonic() < end_s:
        time.sleep(0.05)
    run.down()
    run.overrides = ()
    report = run.folder / "hang" / "rank-0.txt"
    if run.statuses[barked] != 75 or not report.exists():
        raise Missed("the watchdog did not end the other rank")
    yield "the watchdog ended the other"
