"""Runs that really hang: a rank, a loader worker, a file. Each says where it stood, asks to run again, and leaves."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mimscale.resilience.watchdog import EXIT_CODE, named
from tests import ranks

MULTI = [pytest.mark.multi, pytest.mark.slow]


@contextmanager
def running(count: int, recipe: Path, run_dir: Path, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    words = ranks.command(count, "mimscale", "train", recipe, *overrides, "--run-dir", run_dir)
    environment = {**ranks.environment(), "MIMSCALE_REQUEUE_FILE": str(run_dir) + ".again"}
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def until_step(step: int, process: subprocess.Popen[str], run_dir: Path) -> None:
    while len(ranks.curve(run_dir)) < step:
        assert process.poll() is None
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def told(run_dir: Path, rank: int) -> str:
    return (run_dir / "hang" / f"rank-{rank}.txt").read_text()


@pytest.mark.parametrize("what", ["worker", pytest.param("file", id="file")])
@pytest.mark.multi
@pytest.mark.slow
def test_data_that_never_come(what: str, shards: Path, tmp_path: Path) -> None:
    recipe, run_dir = ranks.recipe(tmp_path, shards, schedule={"steps": 4000}), tmp_path / "run"
    words = ["watchdog.stall_s=4", "watchdog.startup_s=120", "data.workers=1"]
    if what == "file":
        copy = tmp_path / "shards"
        shutil.copytree(shards, copy)
        words = ["watchdog.stall_s=4", "watchdog.startup_s=25", "data.workers=0", f"data.shards={copy}"]
    with running(1, recipe, run_dir, *words) as process:
        if what == "worker":
            until_step(5, process, run_dir)
            (worker,) = [child for child in children(process.pid) if b"multiprocessing" not in cmdline(child)]
            os.kill(worker, signal.SIGSTOP)
        else:
            while not (run_dir / "lock").exists():  # the shards were looked at, and not yet read
                assert process.poll() is None
                time.sleep(0.01)
            for path in copy.glob("*.tar"):
                path.unlink()
                os.mkfifo(path)  # nobody ever writes to it
        assert process.wait(120) == EXIT_CODE
        if what == "worker":
            os.kill(worker, signal.SIGKILL)
    text = told(run_dir, 0)
    assert "in phase 'waiting for data'" in text and "Thread" in text and "train.py" in text
    assert ("last samples: [" in text) and ("last samples: []" not in text or what == "file")
    assert what == "worker" or "in read" in text or "open" in text
    assert Path(f"{run_dir}.again").read_text().split()[1] == "hang"


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.multi
@pytest.mark.slow
def test_a_hung_rank_ends_the_run_and_it_goes_on_afterwards(shards: Path, tmp_path: Path) -> None:
    recipe, run_dir = ranks.recipe(tmp_path, shards, schedule={"steps": 40}), tmp_path / "run"
    with running(2, recipe, run_dir, "watchdog.stall_s=5") as process:
        until_step(6, process, run_dir)
        hung = ranks.trainers(process.pid)[1]
        os.kill(hung, signal.SIGSTOP)
        while not (run_dir / "hang" / "rank-0.txt").exists():
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(1)
        os.kill(hung, signal.SIGKILL)
        assert process.wait(120) != 0
    assert "after step" in told(run_dir, 0) and " (number " in told(run_dir, 0)
    step, why = Path(f"{run_dir}.again").read_text().split()
    assert why == "hang" and int(step) in (4, 8)
    ranks.train(2, recipe, run_dir)
    assert (run_dir / "done").read_text() == "40\n"


def test_slow_ranks_and_slow_data_are_named() -> None:
    assert named([("a", 1.0, 0.1, 10.0), ("a", 1.1, 0.0, 10.0), ("b", 1.0, 0.0, 10.0)]) == []
    assert named([("a", 1.0, 0.1, 10.0), ("a", 1.0, 4.0, 10.0), ("b", 3.0, 0.0, 10.0)]) == [
        "rank 1 on a waits for data 40% of the time",
        "rank 2 on b is slow: its forward passes take 3.0 x the median",
    ]
    assert named([("a", 0.0, 0.0, 0.0)]) == []
