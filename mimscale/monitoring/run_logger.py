"""What a run reports: `metrics.jsonl`, panels, its trackers and a progress line. Rank 0 only; silent elsewhere.

A disk that refuses never ends the run: lines wait in memory until it takes them. For trackers see tracker.py.
"""

from __future__ import annotations

import atexit
import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from mimscale.config.difference import flat
from mimscale.errors import printable, without_secrets
from mimscale.fault_tolerance.retrying_writer import RetryingWriter
from mimscale.files.console import plain_console
from mimscale.files.durations import duration
from mimscale.monitoring import panel_files
from mimscale.monitoring.config import LogConfig
from mimscale.monitoring.panel_writer import PanelWriter
from mimscale.monitoring.panels import panel
from mimscale.monitoring.tracker import Start, Trackers, without_secret_values
from mimscale.types import View


class RunLogger:
    """Append-only. Steps that are redone after a resume appear twice in metrics.jsonl; the later line counts."""

    def __init__(self, run_dir: Path, writer: RetryingWriter, *, active: bool) -> None:
        self.console = plain_console(stderr=True, quiet=not active)
        self._active, self._writer, self._run_dir = active, writer, run_dir
        self._trackers: Trackers | None = None
        self._panel_writer: PanelWriter | None = None
        self._progress: Progress | None = None
        self._begun_s = time.monotonic()

    def start(self, *, total: int, step: int, log: LogConfig, recipe: Mapping[str, Any] | None = None) -> None:
        """After `step` steps; it starts threads. recipe: its plain values, for the trackers."""
        if self._active:
            config = without_secret_values(flat(recipe or {}))
            self._trackers = Trackers(Start(self._run_dir, step, config, log), self._not_tracked)
        if self._active and self.console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[line]}", markup=False),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._progress.start()
            atexit.register(self._progress.stop)  # also where a run fails: the terminal gets its cursor back
            self._task = self._progress.add_task("train", total=total, completed=step, line="")
        self._total = total
        self._clock = (step, time.monotonic())

    def print(self, text: str) -> None:
        """A line for the person who watches."""
        with suppress(OSError, SystemExit):  # it may go to a file; for a pipe that nobody reads, rich would end the run
            self.console.print(printable(text), soft_wrap=True)

    def log_event(self, name: str, **values: Any) -> None:
        """Something that happened once: a start, a save, a preemption."""
        self._write({"event": name, **values})

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        """One log line."""
        self._write({"step": step, **metrics})
        if self._trackers is not None:
            self._trackers.log_scalars(step, metrics)
        line = "  ".join(f"{name} {metrics[name]:.4g}" for name in shown(metrics))
        if self._progress is not None:
            self._progress.update(self._task, completed=step, line=line)
        elif self._active:
            first, start_s = self._clock
            eta_s = (time.monotonic() - start_s) / max(1, step - first) * (self._total - step)
            self.print(f"step {step}/{self._total}  {line}  ETA {duration(eta_s)}")

    def log_evaluation(self, step: int, metrics: dict[str, float], seconds: float) -> None:
        """Figures of the student after `step`: an event in metrics.jsonl and, alone, in evals.jsonl; evals/NAME in the
        trackers; and a line.
        """
        event = {"event": "evals", "at": step, **metrics, "seconds": round(seconds, 3)}
        self._write(event)
        self._write(event, "evals.jsonl")
        if self._trackers is not None:
            self._trackers.log_scalars(step, {f"evals/{name}": value for name, value in metrics.items()})
        figures = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.print(f"evals at step {step}:  {figures}  ({seconds:.2g} s)")

    def add_panel(self, step: int, view: View) -> None:
        """A panel for RUN/panels and the trackers, drawn in a thread. The view's tensors must not change later."""
        if self._active:
            if self._panel_writer is None:
                self._panel_writer = PanelWriter(self._publish, self._not_drawn)
            self._panel_writer.show(step, view)

    def _publish(self, step: int, tiles_B3HW: dict[str, Tensor]) -> None:
        if self._trackers is not None:
            self._trackers.log_image(step, "view", panel(tiles_B3HW))
        panel_files.write(self._run_dir, step, tiles_B3HW)

    def _not_drawn(self, step: int, error: Exception) -> None:
        self.log_event("panel_failed", at=step, error=f"{type(error).__name__}: {error}")

    def _not_tracked(self, name: str, error: str) -> None:
        self.log_event("tracker_failed", tracker=name, error=error)

    def close(self, done: bool = False) -> None:
        """done: the run reached its last step."""
        if self._panel_writer is not None:
            self._panel_writer.close()
        if self._progress is not None:
            self._progress.stop()
        if self._trackers is not None:
            self._trackers.close(done)

    def _write(self, values: dict[str, Any], name: str = "metrics.jsonl") -> None:
        if not self._active:
            return
        stamps = {"time": round(time.time(), 3), "uptime_s": round(time.monotonic() - self._begun_s, 3)}
        line = without_secrets(json.dumps({**finite(values), **stamps}))
        self._writer.append(self._run_dir / name, line + "\n")


SHOWN = ("loss", "lr", "images_per_s", "mfu", "host_share", "data_wait", "memory_gib", "power_w")
"""Metrics of the progress line, where they are known."""


def shown(metrics: Mapping[str, float]) -> list[str]:
    """Names of what the progress line shows; without a peak to compare with, MFU is that of a measured product."""
    names = [name if name != "mfu" or name in metrics else "mfu_measured" for name in SHOWN]
    return [name for name in names if name in metrics]


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """None in place of what JSON has no number for."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
