"""Runs that really hang: a rank, a loader worker, a file. Each says where it stood, asks to run again, and leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mimscale.resilience import checkpoint
from mimscale.resilience.pace import named
from mimscale.resilience.watchdog import EXIT_CODE
from tests import ranks


@contextmanager
def running(count: int, run_dir: Path, *words: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A run that hangs for good once it does: the limits bound how long a slow machine may take, not how fast it is."""
    limits = ["watchdog.stall_s=10", "watchdog.startup_s=600", "--run-dir", str(run_dir)]
    environment = {**ranks.environment(), "MIMSCALE_REQUEUE_FILE": str(run_dir) + ".again"}
    with subprocess.Popen(ranks.command(count, *words, *limits), env=environment, text=True) as process:
        yield process
        process.kill()


def until(what: Callable[[], object], process: subprocess.Popen[str]) -> None:
    while not what():
        assert process.poll() is None
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def told(run_dir: Path, rank: int) -> str:
    return (run_dir / "hang" / f"rank-{rank}.txt").read_text()


def assert_waits_for_data(run_dir: Path) -> None:
    text = told(run_dir, 0)
    assert "in phase 'waiting for data'" in text and "Thread" in text and "train.py" in text
    assert "last samples: [" in text and "last samples: []" not in text
    assert Path(f"{run_dir}.again").read_text().split()[1] == "hang"


@pytest.mark.multi
@pytest.mark.slow
def test_a_hung_worker(shards: Path, tmp_path: Path) -> None:
    recipe, run_dir = ranks.recipe(tmp_path, shards, schedule={"steps": 4000}), tmp_path / "run"
    with running(1, run_dir, "mimscale", "train", recipe, "data.workers=1") as process:
        until(lambda: len(ranks.curve(run_dir)) >= 3, process)
        (worker,) = [child for child in children(process.pid) if b"multiprocessing" not in cmdline(child)]
        os.kill(worker, signal.SIGSTOP)
        try:
            assert process.wait(600) == EXIT_CODE
        finally:
            os.kill(worker, signal.SIGKILL)
    assert_waits_for_data(run_dir)


@pytest.mark.multi
@pytest.mark.slow
def test_a_file_read_that_never_returns(shards: Path, tmp_path: Path) -> None:
    """The shards that the run has open turn to noise; opened anew, as damage makes it do, they are mute."""
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    recipe, run_dir = ranks.recipe(tmp_path, copy, schedule={"steps": 4000}), tmp_path / "run"
    with running(1, run_dir, "mimscale", "train", recipe, "data.workers=0") as process:
        until(lambda: len(ranks.curve(run_dir)) >= 6, process)
        for path in sorted(copy.glob("*.tar")):
            with path.open("r+b") as file:
                path.unlink()
                os.mkfifo(path)  # nobody ever writes to it
                file.write(bytes(1 << 20))
        assert process.wait(600) == EXIT_CODE
    assert_waits_for_data(run_dir)
    assert "in __init__" in told(run_dir, 0) and "shards.py" in told(run_dir, 0)


@pytest.mark.multi
@pytest.mark.slow
def test_a_hung_rank_ends_the_run_and_it_goes_on_afterwards(shards: Path, tmp_path: Path) -> None:
    recipe, run_dir = ranks.recipe(tmp_path, shards), tmp_path / "run"
    faults = tmp_path / "faults.json"
    faults.write_text(json.dumps({"stops": [9], "rank": 1}))
    with running(2, run_dir, "tests.faulty", faults, "train", recipe) as process:
        until((run_dir / "hang" / "rank-0.txt").exists, process)
        for rank in filter(stopped, children(process.pid)):  # the launcher would take 30 s for it
            os.kill(rank, signal.SIGKILL)
        assert process.wait(600) != 0
    assert "after step" in told(run_dir, 0) and " (number " in told(run_dir, 0)
    step, why = Path(f"{run_dir}.again").read_text().split()
    assert why == "hang" and int(step) == checkpoint.newest_step(run_dir)
    ranks.train(2, recipe, run_dir)
    assert (run_dir / "done").read_text() == "12\n"


def test_slow_ranks_and_slow_data_are_named() -> None:
    assert named([("a", 1.0, 0.1, 10.0), ("a", 1.1, 0.0, 10.0), ("b", 1.0, 0.0, 10.0)]) == []
    assert named([("a", 1.0, 0.1, 10.0), ("a", 1.0, 4.0, 10.0), ("b", 3.0, 0.0, 10.0)]) == [
        "rank 1 on a waits for data 40% of the time",
        "rank 2 on b is slow: its forward passes take 3.0 x the median",
    ]
    assert named([("a", 0.0, 0.0, 0.0)]) == []
