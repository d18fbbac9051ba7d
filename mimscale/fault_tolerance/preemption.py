"""Preemption: SIGUSR1, SIGTERM or a stop file set a flag, and the loop ends at its next step.

All ranks agree on that step, save, and leave with exit code 0.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

from mimscale.fault_tolerance.retrying_writer import RetryingWriter

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Preemption:
    """Installs the handlers. `raised()` is cheap enough for every step.

    stop_files: paths whose existence asks for the same; checked no more often than every `poll_s` seconds, because
    the run folder may lie on a slow shared file system.
    """

    def __init__(self, stop_files: list[Path], poll_s: float = 5.0) -> None:
        self._stop_files = stop_files
        self._poll_s = poll_s
        self._next_poll_s = 0.0
        self.reason: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def raised(self) -> bool:
        now_s = time.monotonic()
        if self.reason is None and now_s >= self._next_poll_s:
            self._next_poll_s = now_s + self._poll_s
            found = [path for path in self._stop_files if there(path)]
            if found:
                self.reason = f"stop file {found[0]}"
        return self.reason is not None


def there(path: Path) -> bool:
    """Whether it exists, as far as the file system can say."""
    try:
        return path.exists()
    except OSError:
        return False


def ignore_signals() -> None:
    """Before the last save and the exit: Python restores the default action while it shuts down, which would kill."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def leave_requeue_marker(writer: RetryingWriter, step: int, why: str = "asked") -> None:
    """Ask the batch script, through the file that MIMSCALE_REQUEUE_FILE names, to run this job again.

    step: of the newest checkpoint. why: "asked" (a signal) or "hang".
    """
    name = os.environ.get("MIMSCALE_REQUEUE_FILE")
    if name:
        writer.replace(Path(name), f"{step} {why}\n")
