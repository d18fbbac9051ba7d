"""Runs for the fault suite: real trainers, forked from a process that has imported everything, so a start is cheap."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import mimscale.engine.deepspeed_engine
import mimscale.training.loop  # noqa: F401
from data_prep.__main__ import main as data_prep
from mimscale.__main__ import main
from mimscale.data.synthetic import make_image_folder
from mimscale.distributed.end_process import end_process
from mimscale.engine.deepspeed_runtime import import_deepspeed
from mimscale.fault_tolerance.step_guard import StepGuard
from tests import ranks
from tests.faults import trail
from tests.faults.layer import Layer

STEPS, EVERY = 60, 4
LIMIT_S = 300.0  # for anything that is waited for
Plant = Callable[[], None]


class Missed(AssertionError):
    """The fault did not happen, or did not show."""


class Run:
    """One run folder, started as often as it takes."""

    def __init__(self, recipe: Path, folder: Path, world: int = 1) -> None:
        self.recipe, self.folder, self.world = recipe, folder, world
        self.overrides: tuple[str, ...] = ()
        self.plant: Plant = lambda: None  # besides the trail, in every start
        self.step_s = 0.0
        self.undo = ExitStack()
        self.starts = 0
        self.pids: list[int] = []
        self.statuses: dict[int, int] = {}  # exit codes of ended ranks, or minus the signal
        self.lines: list[dict[str, Any]] = []  # of metrics.jsonl
        self._read, self._part = 0, b""
        self._seen, self._log_seen = 0, 0

    # ------------------------------------------------------------------------------------------------ starting, ending

    def start(self) -> None:
        """Fork the ranks."""
        self.starts += 1
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        words = ["train", str(self.recipe), *self.overrides, "--run-dir", str(self.folder)]
        self.pids, self.statuses = [], {}
        for rank in range(self.world):
            pid = os.fork()
            if pid == 0:
                signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as jobs/_common.sh does
                os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.world)})
                os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
                log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                sys.argv = ["mimscale", *words]
                code = 1
                try:
                    trail.plant()
                    self._plant_delay()
                    self.plant()
                    code = main(words)
                except BaseException:
                    traceback.print_exc()
                end_process(code)
            self.pids.append(pid)

    def _plant_delay(self) -> None:
        update, step_s = StepGuard.update, self.step_s

        def delayed(self: StepGuard, *values: Any) -> bool:
            time.sleep(step_s)
            return update(self, *values)

        StepGuard.update = delayed  # type: ignore[method-assign, assignment]

    def kill(self, number: int = signal.SIGKILL, which: list[int] | None = None) -> None:
        for pid in self.pids if which is None else which:
            if pid not in self.statuses:  # its number may be somebody else's by now
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def alive(self) -> bool:
        """Whether any rank is; collects those that have ended."""
        for pid in [pid for pid in self.pids if pid not in self.statuses]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.statuses[pid] = os.waitstatus_to_exitcode(status)
        return any(pid not in self.statuses for pid in self.pids)

    def end(self, patience_s: float = 10.0) -> None:
        """A rank has failed, or all have: let the others notice it, then end them, as srun and torchrun do."""
        end_s = time.monotonic() + patience_s
        while self.alive() and time.monotonic() < end_s:
            time.sleep(0.01)
        self.kill()
        while self.alive():
            time.sleep(0.01)

    def down(self) -> None:
        self.kill()
        self.end()

    # -------------------------------------------------------------------------------------------------------- watching

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def done(self) -> bool:
        return (self.folder / "done").exists()

    def step(self) -> int:
        """The last one that was logged, by any start."""
        self._follow()
        return next((line["step"] for line in reversed(self.lines) if "step" in line), 0)

    def mark(self) -> None:
        """What follows counts for `events` and `said`."""
        self._follow()
        self._seen = len(self.lines)
        self._log_seen = self.log.stat().st_size if self.log.exists() else 0

    def events(self, name: str) -> list[dict[str, Any]]:
        """Those since `mark`."""
        self._follow()
        return [line for line in self.lines[self._seen :] if line.get("event") == name]

    def steps(self) -> list[int]:
        """Those taken since `mark`."""
        self._follow()
        return [line["step"] for line in self.lines[self._seen :] if "step" in line]

    def said(self, text: str) -> bool:
        """Whether the log has it since `mark`."""
        with contextlib.suppress(FileNotFoundError), self.log.open("rb") as file:
            file.seek(self._log_seen)
            return text.encode() in file.read()
        return False

    def launches(self) -> list[dict[str, Any]]:
        path = self.folder / "launches.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def until(self, wish: Callable[[], object], what: str = "") -> None:
        """Wait for it; raises Missed when the run ends before."""
        end_s = time.monotonic() + LIMIT_S
        while not wish():
            if not self.alive() and not wish():
                raise Missed(f"the run ended before {what or 'its fault'}")
            if time.monotonic() > end_s:
                raise Missed(f"{what or 'its fault'} did not come in {LIMIT_S:g} s")
            time.sleep(0.01)

    def until_step(self, step: int) -> None:
        self.until(lambda: self.step() >= step, f"step {step}")

    def workers(self, rank: int = 0) -> list[int]:
        """Loader workers of a rank."""
        found = Path(f"/proc/{self.pids[rank]}/task/{self.pids[rank]}/children").read_text().split()
        return [int(child) for child in found]

    def recover(self) -> tuple[float, int]:
        """Start again, if it has ended, until it goes on; (seconds to its first new step, 0 if it had not ended; steps
        that are taken once more)."""
        last, back_s = self.step(), 0.0
        for _ in range(3):
            if self.alive() or self.done:
                break
            known, start_s = len(self.lines), time.monotonic()
            self.start()
            while self.alive() and not any("step" in line for line in self.lines[known:]):
                if time.monotonic() - start_s > LIMIT_S:
                    raise Missed(f"no step in {LIMIT_S:g} s")
                time.sleep(0.01)
                self._follow()
            self._follow()
            back_s = time.monotonic() - start_s
        if not self.alive() and not self.done:
            raise Missed(f"the run does not go on: {self.log.read_text()[-300:]}")
        return back_s, max(0, last - self.launches()[-1]["step"]) if back_s else 0

    def finish(self) -> None:
        """To its last step. Raises Missed where the last start does not end with exit code 0."""
        while not self.done:
            self.recover()
            end_s = time.monotonic() + LIMIT_S + STEPS
            while self.alive():
                if time.monotonic() > end_s:
                    raise Missed("the run does not end")
                time.sleep(0.02)
        self.end(patience_s=60.0)
        if any(self.statuses.values()):
            raise Missed(f"the run is done and ended with {self.statuses}")

    def close(self) -> None:
        self.down()
        self.undo.close()

    def _follow(self) -> None:
        path = self.folder / "metrics.jsonl"
        if not path.exists() or path.stat().st_size == self._read:
            return
        with path.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        self._read += len(new)
        *whole, self._part = (self._part + new).split(b"\n")
        self.lines += [json.loads(line) for line in whole if line]


class Lab:
    """Data, recipes, the fault layer, and for each number of ranks the run that nothing strikes."""

    def __init__(self, folder: Path, seed: int, layer: Layer) -> None:
        self.folder, self.random, self.layer = folder, random.Random(seed), layer
        make_image_folder(folder / "images", classes=4, per_class=20, side=48)
        self.shards = folder / "shards"
        assert data_prep(["folder", str(folder / "images"), str(self.shards), "--shard-samples", "16"]) == 0
        (folder / "taught").mkdir()
        sections: dict[str, dict[str, Any]] = {
            "student": {"depth": 1},  # the steps are most of the suite's time
            "engine": {"max_micro_batch": 16},
            "schedule": {"steps": STEPS},
            "checkpoint": {"every": EVERY, "patience_s": 2.0, "keep": 2},
            "watchdog": {"stall_s": 60.0, "startup_s": 600.0},
        }
        self.recipe = ranks.recipe(folder, self.shards, "mae", **sections)
        self.taught = ranks.recipe(folder / "taught", self.shards, "maskalign", **{**sections, "student": {}})
        self._whole: dict[int, tuple[Run, trail.Samples]] = {}
        self.save_ops = ""  # the file operations of one save, see shim.c

    def new_run(self, name: str, world: int) -> Run:
        run = Run(self.recipe, self.folder / name, world)
        run.step_s = 0.03
        return run

    def undisturbed(self, world: int) -> tuple[Run, trail.Samples]:
        """The run that all others are compared with."""
        if world not in self._whole:
            run = Run(self.recipe, self.folder / f"undisturbed-{world}", world)
            self.layer.watch("owsmru", run.checkpoints)
            run.finish()
            if run.starts > 1:  # then whatever ended it, no fault did
                raise RuntimeError(f"the undisturbed run was started {run.starts} times: {run.log.read_text()[-3000:]}")
            if world == 1:
                *_, last = self.layer.trace.split("m")
                self.save_ops = f"m{last}"
            samples = trail.samples(run.folder, self.shards, STEPS)
            assert samples.all_there, "the undisturbed run itself lost samples"
            self._whole[world] = run, samples
        return self._whole[world]

    def checked(self, run: Run) -> tuple[bool, bool, trail.Samples]:
        """(weights, moments and counters equal to the bit, the same samples in every step, samples)."""
        whole, expected = self.undisturbed(run.world)
        samples = trail.samples(run.folder, self.shards, STEPS)
        return ranks.identical(run.folder, whole.folder), samples.sequence == expected.sequence, samples


def mounted(words: list[str]) -> bool:
    """Whether mount did as it was asked. It needs to be root."""
    return shutil.which("mount") is not None and subprocess.run(["mount", *words], capture_output=True).returncode == 0


def unmount(path: Path) -> None:
    """What was mounted there last, if anything. os.path.ismount does not see a bind mount."""
    if str(path) in (line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()):
        subprocess.run(["umount", "-l", str(path)], check=True)


def import_everything() -> None:
    """Also what trainers import late: seconds of each start."""
    import_deepspeed(torch.device("cpu"))
    for name in ("torch._inductor.compile_fx", "deepspeed.runtime.zero.muon.muon_optimizer"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
