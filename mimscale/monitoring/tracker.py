"""Where curves, evaluations and panels go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

A tracker may raise and may hang, as disks and networks do, and its methods know nothing of that: each tracker has a
thread of its own (`TrackerThread`), and what fails is left out until the next start. The training loop puts its numbers
into a bounded queue and goes on.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor

from mimscale.errors import printable, warn, without_secrets
from mimscale.monitoring.config import LogConfig

WAITING = 512
"""Calls at most that wait for a tracker; then numbers are left out."""
IMAGES_WAITING = 8
"""Of them, images at most."""
CLOSE_S = 20.0
"""How long the end of a run waits for all its trackers together."""


@dataclass(frozen=True)
class Start:
    """What a tracker is told of the run. step: optimiser steps that are done; later ones may have been logged before.
    config: the recipe's plain values, without what may be a secret.
    """

    run_dir: Path
    step: int
    config: Mapping[str, Any]
    log: LogConfig


class Tracker(Protocol):
    """One run in one program. Made on rank 0 only; all calls come from one thread, in order, and may block or raise."""

    def start(self, start: Start) -> None:
        """Begin, or go on with what an earlier launch of the same run folder began."""

    def log_config(self, values: Mapping[str, Any]) -> None:
        """The recipe: flat `section.key` -> plain value."""

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after `step` optimiser steps; they may be NaN or infinite. Steps may come again, or be lower."""

    def log_image(self, step: int, name: str, image_3HW: Tensor) -> None:
        """uint8 [3, H, W] in host memory."""

    def close(self, done: bool) -> None:
        """Send what is left. done: the run reached its last step; else it may go on in a later launch."""


def check(config: LogConfig) -> None:
    """Raise UserError for a tracker that cannot work: its package is not installed, or it does not know where to go."""
    for name in config.trackers:
        _module(name).check(config)


def _module(name: str) -> Any:
    return import_module(f"mimscale.monitoring.trackers.{name}")


class Trackers:
    """All trackers of a run. No call waits, but `close`, for at most CLOSE_S.

    failed: told of (name, error) when one is left out, from its thread.
    """

    def __init__(self, start: Start, failed: Callable[[str, str], None] = lambda name, error: None) -> None:
        self._threads = [TrackerThread(name, _module(name).make, start, failed) for name in start.log.trackers]

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        for thread in self._threads:
            thread.put("log_scalars", step, dict(values))

    def log_image(self, step: int, name: str, image_3HW: Tensor) -> None:
        for thread in self._threads:
            thread.put("log_image", step, name, image_3HW)

    def close(self, done: bool, patience_s: float = CLOSE_S) -> None:
        """Calling it again does nothing."""
        end_s = time.monotonic() + patience_s
        for thread in self._threads:
            thread.end(done)
        for thread in self._threads:
            thread.join(max(0.0, end_s - time.monotonic()), patience_s)
        self._threads = []


class TrackerThread:
    """A tracker in a thread. The first exception ends it, with one warning."""

    def __init__(
        self, name: str, make: Callable[[], Tracker], start: Start, failed: Callable[[str, str], None]
    ) -> None:
        self.name, self.alive = name, True
        self._make, self._start, self._failed = make, start, failed
        self._calls: queue.Queue[tuple[str, Sequence[Any]]] = queue.Queue(WAITING)
        self._images, self._dropped, self._mutex = 0, 0, threading.Lock()
        self._done: bool | None = None  # once the run has ended: whether it reached its last step
        self._thread = threading.Thread(target=self._work, name=f"tracker_{name}", daemon=True)
        self._thread.start()

    def put(self, call: str, *args: Any) -> None:
        """Have a method called later, or never where too many wait."""
        if not self.alive:
            return
        with self._mutex:
            image = call == "log_image"
            if not (image and self._images >= IMAGES_WAITING):
                try:
                    self._calls.put_nowait((call, args))
                    self._images += image
                    return
                except queue.Full:
                    pass
            self._dropped += 1
        if self._dropped == 1:
            warn(f"{self.name}: it does not keep up, and lines are left out of it; metrics.jsonl has the numbers")

    def end(self, done: bool) -> None:
        self._done = done
        with self._mutex:
            if self._calls.full():  # its place is needed; it stands in metrics.jsonl
                self._calls.get_nowait()
            self._calls.put_nowait(("close", (done,)))

    def join(self, timeout_s: float, patience_s: float) -> None:
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.alive = False
            warn(f"{self.name}: it has not finished after {patience_s:g} s and is left; metrics.jsonl has the numbers")

    def _work(self) -> None:
        try:
            tracker = self._make()
            tracker.start(self._start)
            tracker.log_config(self._start.config)
            while True:
                call, args = self._calls.get()
                if call == "log_image":
                    with self._mutex:
                        self._images -= 1
                getattr(tracker, call)(*args)
                if call == "close":
                    return
        except (Exception, SystemExit) as error:  # of a library, a disk or a network: none of them may end a run
            if self.alive:
                text = printable(" ".join(str(error).split())[:300] or type(error).__name__)
                warn(f"{self.name}: {text}; left out until the next start, metrics.jsonl has the numbers")
                self._failed(self.name, text)
        finally:
            self.alive = False


def without_secret_values(values: Any) -> Any:
    """Plain values with every text in them cut as `without_secrets` does."""
    if isinstance(values, Mapping):
        return {key: without_secret_values(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [without_secret_values(value) for value in values]
    return without_secrets(values) if isinstance(values, str) else cast(Any, values)
