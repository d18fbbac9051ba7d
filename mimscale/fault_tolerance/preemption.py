"""Preemption: SIGUSR1, SIGTERM, Ctrl-C or a stop file set a flag, and the loop ends at its next step.

All ranks agree on that step, save, and leave with exit code 0; after Ctrl-C (SIGINT) with 130 and without a wish to run
again. A second SIGINT leaves at once, and so does the first one before there is a step to save.

A signal's handler runs between two lines of Python, so a process that waits in a call for ranks that never come hears
nothing. `SignalWatch` does: a thread that the signal itself wakes.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import select
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Literal

from mimscale.distributed.coordination import Waits
from mimscale.distributed.launcher import LAUNCHED
from mimscale.distributed.rendezvous import AGAIN_S, REPORT_S, named
from mimscale.errors import warn
from mimscale.fault_tolerance.retrying_writer import RetryingWriter

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
HANDLED = (*SIGNALS, signal.SIGINT)
INTERRUPTED = 128 + signal.SIGINT
ECHO_S = 1.0  # torchrun repeats to its ranks the Ctrl-C that the terminal has sent to them already
GRACE_S = 3.0  # in which a process that is asked to leave must have reacted
STUCK_S = 30.0  # the same in the loop, where one step may take a while


class Preemption:
    """Installs the handlers. `raised()` is cheap enough for every step.

    stop_files: paths whose existence asks for the same; checked no more often than every `poll_s` seconds, because
    the run folder may lie on a slow shared file system. phase: "start" until there is something to save, then "loop",
    and "end" from the last save on. step_s: the longest time between two calls of `raised` so far.
    """

    def __init__(self, stop_files: list[Path], poll_s: float = 5.0) -> None:
        self._stop_files = stop_files
        self._poll_s = poll_s
        self._next_poll_s = 0.0
        self._interrupted_s = -ECHO_S
        self._pid = os.getpid()
        self.reason: str | None = None
        self.phase: Literal["start", "loop", "end"] = "start"
        self.step_s, self._raised_s = 0.0, math.inf
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # of `nohup` and of a shell's background jobs
            signal.signal(signal.SIGINT, self._on_interrupt)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a worker that was just forked, and that the trainer ends
        now_s, first = time.monotonic(), self.reason != "SIGINT"
        if first:
            self.reason, self._interrupted_s = "SIGINT", now_s
        if self.phase == "start" or now_s - self._interrupted_s >= ECHO_S:
            raise KeyboardInterrupt

    def raised(self) -> bool:
        now_s = time.monotonic()
        self.step_s, self._raised_s = max(self.step_s, now_s - self._raised_s), now_s
        if self.reason is None and now_s >= self._next_poll_s:
            self._next_poll_s = now_s + self._poll_s
            found = [path for path in self._stop_files if there(path)]
            if found:
                self.reason = f"stop file {found[0]}"
        return self.reason is not None

    def leave_if_asked(self) -> None:
        """Before there is anything to save: raise SystemExit where a signal or a stop file asks for the end."""
        if self.raised():
            warn(f"stopped before the first step ({self.reason})")
            raise SystemExit(128 + signal.SIGTERM)


class SignalWatch:
    """A thread beside the main thread, until `close`. Made in the main thread, after `Preemption`.

    It says whom this rank waits for, once a wait takes `report_s`. It ends a process that was asked to leave and does
    not react, because a call keeps it that waits for others. Where a launcher started this rank and is gone, it
    asks for the end as a signal would.
    """

    def __init__(self, preemption: Preemption, rank: int, report_s: float = REPORT_S) -> None:
        self._preemption, self._rank, self._report_s = preemption, rank, report_s
        self.coordinator: Waits | None = None
        self._parent = os.getppid() if any(name in os.environ for name in LAUNCHED) else None
        self._asked: tuple[str, int, float] | None = None  # what asked first, the exit code, when
        self._interrupts: list[float] = []
        self._reported: tuple[int, float] = (-1, 0.0)
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self._closed = False
        self._pid = os.getpid()
        self._before = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signal_watch", daemon=True).start()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            with suppress(ValueError):
                signal.set_wakeup_fd(self._before)

    # ------------------------------------------------------------------------------------------------- in the thread

    def _watch(self) -> None:
        while not self._closed:
            with suppress(OSError):
                if select.select([self._read], [], [], 0.5)[0]:
                    self._received(self._read.recv(64))
            with suppress(Exception):  # the store may be gone, with the rank that served it
                self._report()
            self._notice_orphan()
            self._leave_where_stuck()

    def _received(self, numbers: bytes) -> None:
        now_s = time.monotonic()
        for number in numbers:
            if number == signal.SIGINT and (not self._interrupts or now_s - self._interrupts[-1] >= ECHO_S):
                self._interrupts.append(now_s)
            if number in (signal.SIGINT, signal.SIGTERM) and self._asked is None:
                self._asked = signal.Signals(number).name, 128 + number, now_s

    def _report(self) -> None:
        waiting, now_s = self._waiting(), time.monotonic()
        if self.coordinator is None or waiting is None or now_s - waiting[2] < min(5.0, self._report_s):
            return
        absent = self.coordinator.absent()
        number, said_s = self._reported
        if now_s - waiting[2] < self._report_s or (number == waiting[0] and now_s - said_s < AGAIN_S):
            return
        here = [rank for rank in range(self.coordinator.world) if rank not in absent]
        if absent and self._rank == min(here, default=self._rank):  # one line, not one of each rank
            self._reported = waiting[0], now_s
            warn(
                f"rank {self._rank} has waited for {named(absent)} for {now_s - waiting[2]:.0f} s, in {waiting[1]} "
                f"(number {waiting[0]})"
            )

    def _notice_orphan(self) -> None:
        if self._parent is not None and os.getppid() != self._parent:
            self._parent = None
            self._preemption.reason = self._preemption.reason or "the launcher of this rank has ended"
            self._asked = self._asked or (self._preemption.reason, 128 + signal.SIGTERM, time.monotonic())

    def _leave_where_stuck(self) -> None:
        """End the process where the main thread does not get to do so."""
        now_s = time.monotonic()
        if len(self._interrupts) > 1 and now_s - self._interrupts[-1] > GRACE_S:
            self._leave("interrupted twice", INTERRUPTED)
        phase, waiting, deaf = self._preemption.phase, self._waiting(), self._preemption.reason is None
        if self._asked is None or phase == "end" or not (deaf or waiting):
            return
        reason, code, asked_s = self._asked
        since_s = max(asked_s, waiting[2]) if waiting is not None else asked_s
        if now_s - since_s > (GRACE_S if phase == "start" else max(STUCK_S, 3 * self._preemption.step_s)):
            whom = "others"
            if self.coordinator is not None and waiting is not None:
                with suppress(Exception):
                    whom = named(absent) if (absent := self.coordinator.absent()) else whom
            self._leave(f"{reason} while it waits for {whom}", code)

    def _waiting(self) -> tuple[int, str, float] | None:
        return None if self.coordinator is None else self.coordinator.waiting

    def _leave(self, why: str, code: int) -> None:
        warn(f"rank {self._rank} leaves without saving: {why}")
        end_children()
        os._exit(code)


def end_children() -> None:
    """Kill the processes that this one has started: they ignore the signals that multiprocessing would send."""
    for child in multiprocessing.active_children():
        child.kill()


def _forget_watch() -> None:
    with suppress(ValueError):  # of a fork in another thread
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_watch)  # else a worker's signals would seem to be the trainer's


def there(path: Path) -> bool:
    """Whether it exists, as far as the file system can say."""
    try:
        return path.exists()
    except OSError:
        return False


def ignore_signals() -> None:
    """Before the last save and the exit: Python restores the default action while it shuts down, which would kill.

    SIGINT stays: a person who repeats it wants the end now.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def leave_requeue_marker(writer: RetryingWriter, step: int, why: str = "asked") -> None:
    """Ask the batch script, through the file that MIMSCALE_REQUEUE_FILE names, to run this job again.

    step: of the newest checkpoint. why: "asked" (a signal) or "hang".
    """
    name = os.environ.get("MIMSCALE_REQUEUE_FILE")
    if name:
        writer.replace(Path(name), f"{step} {why}\n")
