"""A run that stands still ends itself, and says where it stood.

Each rank beats at every step. A rank that has not for `stall_s` writes RUN/hang/rank-R.txt: the stacks of all its
threads and, with py-spy, of its loader workers; which phase and which samples it was in; its last agreement with the
others. In synchronous training all ranks stop within one step of each other, so all of them write. Then it asks for
the job to run again, as after a signal, and leaves with exit code 75: a hung rank blocks the nodes of all others.

Two watchers, because the one in Python needs the interpreter: where a call keeps it, the C timer of `faulthandler`
writes the stacks a while later and ends the process.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mimscale.config import WatchdogConfig
from mimscale.resilience import checkpoint
from mimscale.resilience.control import Control
from mimscale.resilience.preempt import leave_requeue_marker

EXIT_CODE = 75  # "try again later"
SLOW = 1.5  # times the median step of the ranks
WAITS = 0.25  # share of the time


class Watchdog:
    """Starts with the process: until the first step the limit is `startup_s`. `close()` before the process ends."""

    def __init__(self, run_dir: Path, rank: int, config: WatchdogConfig) -> None:
        self._run_dir, self._rank, self._config = run_dir, rank, config
        self._limit_s, self._beat_s, self._beats = config.startup_s, time.monotonic(), 0
        self.phase, self.step, self.ids = "start", 0, list[Tensor]()
        self.control: Control | None = None
        self._closed = threading.Event()
        if config.stall_s and config.startup_s:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, step: int) -> None:
        """A step is done. Costs an assignment."""
        self.step, self._limit_s, self._beat_s = step, self._config.stall_s, time.monotonic()
        self._beats += 1

    def close(self) -> None:
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    # ------------------------------------------------------------------------------------------------- in the thread

    def _watch(self) -> None:
        seen = -1
        while not self._closed.wait(min(self._limit_s / 10, 5.0)):
            if self._beats != seen:
                seen = self._beats
                faulthandler.dump_traceback_later(1.5 * self._limit_s + 30.0, exit=True)
            if time.monotonic() - self._beat_s > self._limit_s:
                self._bark()

    def _bark(self) -> None:
        text = self._report()
        print(text, file=sys.stderr, flush=True)
        try:
            folder = self._run_dir / "hang"
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"rank-{self._rank}.txt").open("a") as file:
                file.write(text + "\n")
                faulthandler.dump_traceback(file, all_threads=True)
                file.write(_workers())
            leave_requeue_marker(checkpoint.newest_step(self._run_dir), "hang")
        finally:
            time.sleep(min(self._limit_s / 3, 15.0))  # the first to leave ends the others; let them write too
            os._exit(EXIT_CODE)

    def _report(self) -> str:
        samples = [int(sample) for micro in self.ids for sample in micro][-64:]
        agreement = self.control.last if self.control is not None else "none"
        return (
            f"watchdog: rank {self._rank} on {platform.node()} has not advanced for {self._limit_s:g} s after step "
            f"{self.step}, in phase '{self.phase}'; last agreement: {agreement}; "
            f"last samples: {samples}; stacks in {self._run_dir / 'hang'}"
        )


def _workers() -> str:
    """Stacks of this process's children, where py-spy is installed and permitted."""
    spy = shutil.which("py-spy")
    text = ""
    for child in multiprocessing.active_children():
        text += f"\n== child {child.pid} ({child.name})"
        if spy is None:
            text += ": py-spy is not installed"
            continue
        try:
            done = subprocess.run([spy, "dump", "--pid", str(child.pid)], capture_output=True, text=True, timeout=20)
            text += f"\n{done.stdout}{done.stderr}"
        except (OSError, subprocess.TimeoutExpired) as error:
            text += f": {error}"
    return text + "\n"


class Spread:
    """Compares the ranks every `every` steps: whose forward passes take longer, and who waits for data.

    A forward pass is a rank's own work (under ZeRO-3 it also waits for the others' weights). On a GPU its time is that
    of the last one before the comparison, taken by events, so that nothing waits for the device in between.
    """

    def __init__(self, control: Control, every: int, device: torch.device) -> None:
        self._control, self._every = control, every
        cuda = device.type == "cuda"
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if cuda else []
        self._forward_s = self._waiting_s = 0.0
        self._start_s = self._mark_s = time.perf_counter()

    def waited(self) -> None:
        """The batch is here."""
        now_s = time.perf_counter()
        self._waiting_s += now_s - self._mark_s
        self._mark_s = now_s
        if self._events:
            self._events[0].record()

    def forwarded(self) -> None:
        """The loss is there."""
        if self._events:
            self._events[1].record()
        else:
            self._forward_s += time.perf_counter() - self._mark_s

    def stepped(self) -> None:
        """The backward pass, or with it the optimiser step, is done: from here on the rank waits for its next batch."""
        self._mark_s = time.perf_counter()

    def compare(self, step: int) -> list[str]:
        """Lines for the log; nothing at most steps. Collective at multiples of `every`."""
        if not self._every or step % self._every:
            return []
        if self._events:
            self._events[1].synchronize()
            self._forward_s = self._events[0].elapsed_time(self._events[1]) / 1000
        now_s = time.perf_counter()
        mine = (platform.node(), self._forward_s, self._waiting_s, now_s - self._start_s)
        self._forward_s = self._waiting_s = 0.0
        self._start_s = now_s
        return named(self._control.gather(mine))


def named(ranks: Sequence[tuple[str, float, float, float]]) -> list[str]:
    """(host, seconds of forward passes, of waiting for data, in all) of each rank -> a line for each that is slow."""
    own = sorted(rank[1] for rank in ranks)
    median = own[len(own) // 2] if len(own) % 2 else (own[len(own) // 2 - 1] + own[len(own) // 2]) / 2
    lines = []
    for rank, (host, own_s, waiting_s, total_s) in enumerate(ranks):
        if own_s > SLOW * median:
            lines.append(f"rank {rank} on {host} is slow: its forward passes take {own_s / median:.1f} x the median")
        if waiting_s > WAITS * total_s > 0:
            lines.append(f"rank {rank} on {host} waits for data {waiting_s / total_s:.0%} of the time")
    return lines
