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
import threading
import time
from pathlib import Path
from typing import Protocol

from torch import Tensor

from mimscale.checkpoint import format as checkpoint
from mimscale.distributed.coordination import Coordinator
from mimscale.errors import warn
from mimscale.fault_tolerance.config import WatchdogConfig
from mimscale.fault_tolerance.preemption import leave_requeue_marker
from mimscale.fault_tolerance.retrying_writer import RetryingWriter
from mimscale.files.regular import open_to_write

EXIT_CODE = 75  # "try again later"


class Position(Protocol):
    """Where a rank is: what it does, and int64 sample ids of the micro-batches of the step under way."""

    phase: str
    ids: list[Tensor]


class Watchdog:
    """Starts with the process: until the first step the limit is `startup_s`. `close()` before the process ends."""

    def __init__(self, run_dir: Path, rank: int, config: WatchdogConfig, position: Position) -> None:
        self._run_dir, self._rank, self._config, self._position = run_dir, rank, config, position
        self._limit_s, self._beat_s, self._beats, self.step = config.startup_s, time.monotonic(), 0, 0
        self.coordinator: Coordinator | None = None
        self._closed = threading.Event()
        if config.stall_s and config.startup_s:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, step: int) -> None:
        """A step is done. Costs an assignment."""
        self.step, self._limit_s = step, self._config.stall_s
        self.alive()

    def alive(self) -> None:
        """No step, but something goes on: a last save that is slow, for example."""
        self._beat_s = time.monotonic()
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
                limit_s = 1.5 * self._limit_s + 30.0
                faulthandler.dump_traceback_later(limit_s, exit=True, file=2)  # sys.stderr may be no file
            if time.monotonic() - self._beat_s > self._limit_s:
                self._bark()

    def _bark(self) -> None:
        text, writer = self._report(), RetryingWriter()
        warn(text)
        try:
            leave_requeue_marker(writer, checkpoint.newest_step(self._run_dir), "hang")
            self._write_stacks(text)
        finally:
            writer.flush(patience_s=min(self._limit_s / 3, 15.0))
            time.sleep(min(self._limit_s / 3, 15.0))  # the first to leave ends the others; let them write too
            os._exit(EXIT_CODE)

    def _write_stacks(self, text: str) -> None:
        folder = self._run_dir / "hang"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"rank-{self._rank}.txt"
            with os.fdopen(open_to_write(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a") as file:
                file.write(text + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write(_workers())
        except OSError as error:
            warn(f"{folder}: {error.strerror}; the stacks are printed here")
            faulthandler.dump_traceback(all_threads=True)

    def _report(self) -> str:
        samples = [int(sample) for micro in self._position.ids for sample in micro][-64:]
        agreement = self.coordinator.last if self.coordinator is not None else "none"
        return (
            f"watchdog: rank {self._rank} on {platform.node()} has not advanced for {self._limit_s:g} s after step "
            f"{self.step}, in phase '{self._position.phase}'; last agreement: {agreement}; "
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
