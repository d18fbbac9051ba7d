"""`log.profile`: torch.profiler around a few steps of a run, as a Chrome trace and a table in RUN/profile.

It records what happens anyhow, so the run computes the same. Whatever fails in it costs the profile and not the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

from mimscale.files.atomic import atomic_path, atomic_write
from mimscale.files.measurement import table
from mimscale.monitoring import torch_profile
from mimscale.monitoring.config import ProfileConfig

FOLDER = "profile"


class ProfileWindow:
    """Of one rank. It records the steps `at` to `at + steps - 1`; a resume behind `at` records none.

    say: prints a line; log_event: for metrics.jsonl. Both are silent on all ranks but the first.
    """

    def __init__(
        self,
        run_dir: Path,
        config: ProfileConfig | None,
        rank: int,
        device: torch.device,
        say: Callable[[str], None],
        log_event: Callable[..., None],
    ) -> None:
        self._config = config if config is not None and rank < config.ranks else None
        self._run_dir, self._rank, self._device = run_dir, rank, device
        self._say, self._log_event = say, log_event
        self._profiler: profile | None = None

    def before_step(self, step: int) -> None:
        """Start where the window begins."""
        if self._config is not None and step == self._config.at and self._profiler is None:
            self._attempt(self._start)

    def after_step(self, step: int) -> float:
        """Write where the window ends, or lies behind a roll-back. Returns the seconds that this took."""
        if self._profiler is None or self._config is None:
            return 0.0
        start_s, done = time.perf_counter(), step - self._config.at + 1
        if not 0 < done < self._config.steps:
            self._attempt(lambda: self._stop(done))
        return time.perf_counter() - start_s

    def close(self, step: int) -> None:
        """At the end of a run, which may lie inside the window."""
        if self._profiler is not None and self._config is not None:
            self._attempt(lambda: self._stop(step - self._config.at + 1))  # type: ignore[union-attr]

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._profiler = self._config = None
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._log_event("profile_failed", error=text)
            self._say(f"log.profile failed, training goes on: {text}")

    def _start(self) -> None:
        profiler = torch_profile.start(self._device)
        profiler.start()
        self._profiler = profiler

    def _stop(self, steps: int) -> None:
        """steps: that were recorded; of fewer than one there is nothing to write."""
        assert self._profiler is not None and self._config is not None
        profiler, self._profiler = self._profiler, None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        profiler.stop()
        if steps < 1:
            return
        found = torch_profile.figures(profiler, self._device, steps)
        name = f"step-{self._config.at:09d}-rank-{self._rank}"
        folder = self._run_dir / FOLDER
        folder.mkdir(exist_ok=True)
        with atomic_path(folder / f"{name}.json.gz") as part:
            raw = part.with_name(f"{part.name}.trace.json.gz")  # by this ending the profiler compresses it
            try:
                profiler.export_chrome_trace(str(raw))
                raw.replace(part)
            finally:
                raw.unlink(missing_ok=True)
        last = self._config.at + steps - 1
        text = f"steps {self._config.at} to {last}, rank {self._rank}, {self._device.type}: {describe(found)}"
        atomic_write(folder / f"{name}.md", f"{text}\n".encode())
        self._log_event("profile", at=self._config.at, steps=steps, **{k: found[k] for k in KEYS})
        self._say(f"profile of {text}\n\nwrote {folder / name}.json.gz, for chrome://tracing or ui.perfetto.dev")


KEYS = ("kernel_ms", "kernels", "communication_ms")


def describe(found: dict[str, Any]) -> str:
    """A sentence and the tables of what takes longest, in Markdown; milliseconds and calls are those of one step."""
    head = (
        f"{found['kernels']} {found['counted']} take {found['kernel_ms']:.2f} ms per step, "
        f"{found['communication_ms']:.2f} ms of it in collectives"
    )
    parts = [head]
    for title, rows in ((found["counted"].removesuffix("s"), found["top"]), ("on the host", found["host_top"])):
        if rows is found["top"] or rows != found["top"]:
            cells = [[name.replace("|", "/"), f"{ms:.3f}", f"{count:.1f}"] for name, ms, count in rows]
            parts.append(table([title, "ms per step", "calls per step"], cells))
    return "\n\n".join(parts)
