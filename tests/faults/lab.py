"""Runs for the fault suite: real trainers, forked from a process that has imported everything, so a start is cheap."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mimscale.engine.engine
import mimscale.train  # noqa: F401
from mimscale.__main__ import end_process, main
from mimscale.engine.world import import_deepspeed
from mimscale.resilience import checkpoint
from tests import ranks

STEPS, EVERY = 24, 4
Plant = Callable[[], None]


class Run:
    """One run folder, started as often as it takes."""

    def __init__(self, recipe: Path, folder: Path, world: int = 1, *overrides: str) -> None:
        self.recipe, self.folder, self.world, self.overrides = recipe, folder, world, overrides
        self.pids: list[int] = []
        self.starts = 0

    def start(self, plant: Plant | None = None, environment: Mapping[str, str] | None = None) -> None:
        """Fork the ranks. plant: called in each of them before the trainer runs."""
        self.starts += 1
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        words = ["train", str(self.recipe), *self.overrides, "--run-dir", str(self.folder)]
        self.pids = []
        for rank in range(self.world):
            pid = os.fork()
            if pid == 0:
                signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as jobs/_common.sh does
                os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.world)})
                os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **(environment or {})})
                log = os.open(f"{self.folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                sys.argv = ["mimscale", *words]
                code = 1
                with contextlib.suppress(BaseException):
                    if plant is not None:
                        plant()
                    code = main(words)
                end_process(code)
            self.pids.append(pid)

    def end_after(self, limit_s: float = 600.0) -> None:
        """Wait until all ranks have left, at most so long; then end what is left."""
        end_s = time.monotonic() + limit_s
        while self.alive() and time.monotonic() < end_s:
            time.sleep(0.02)
        self.end()

    def alive(self) -> bool:
        return any(Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" for pid in self.pids if _there(pid))

    def until(self, step: int, limit_s: float = 600.0) -> None:
        """Return when a step has been logged, or the run is over."""
        end_s = time.monotonic() + limit_s
        while self.alive() and time.monotonic() < end_s and max(ranks.curve(self.folder), default=0) < step:
            time.sleep(0.01)

    def until_saved(self, count: int, limit_s: float = 600.0) -> None:
        """Return when so many checkpoints were noted as written, or the run is over."""
        end_s = time.monotonic() + limit_s
        while self.alive() and time.monotonic() < end_s and len(self.events("saved")) < count:
            time.sleep(0.01)

    def kill(self, number: int = signal.SIGKILL, which: list[int] | None = None) -> None:
        for pid in which or self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def workers(self, rank: int = 0) -> list[int]:
        """Loader workers of a rank."""
        found = Path(f"/proc/{self.pids[rank]}/task/{self.pids[rank]}/children").read_text().split()
        return [int(child) for child in found]

    def end(self) -> None:
        """One rank has failed, or all have: let the others notice it, then end them."""
        end_s = time.monotonic() + 5
        while self.alive() and time.monotonic() < end_s:
            time.sleep(0.05)
        self.kill()
        for pid in self.pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)

    def finish(self, tries: int = 4) -> float:
        """Start again until the run is done; seconds from here to the first new step."""
        start_s, lines, back_s = time.monotonic(), len(ranks.lines(self.folder)), 0.0
        for _ in range(tries):
            if self.done:
                break
            self.start()
            while self.alive():
                if not back_s and any("step" in line for line in ranks.lines(self.folder)[lines:]):
                    back_s = time.monotonic() - start_s
                time.sleep(0.02)
            self.end()
        return back_s

    @property
    def done(self) -> bool:
        return (self.folder / "done").exists()

    def redone(self) -> int:
        """Steps that were taken more than once."""
        steps = [line["step"] for line in ranks.lines(self.folder) if "step" in line]
        return len(steps) - len(set(steps))

    def newest(self) -> Path:
        path = checkpoint.newest(self.folder)
        assert path is not None
        return path

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in ranks.lines(self.folder) if line.get("event") == name]


def _there(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").exists()


def prepare_imports() -> None:
    import torch

    import_deepspeed(torch.device("cpu"))
