"""Runs that really hang: a rank, a loader worker, a file. Each says where it stood, asks to run again, and leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mimscale.checkpoint import format as checkpoint
from mimscale.fault_tolerance.watchdog import EXIT_CODE
from mimscale.monitoring.phase_timer import named
from tests import ranks


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIMSCALE_REQUEUE_FILE", str(tmp_path / "again"))
    return tmp_path / "run"


def hang(count: int, run_dir: Path, meanwhile: Callable[[list[int]], None], *words: str | Path) -> int:
    """The exit code of a run that hangs for good: the limits bound how long a slow machine may take, not how fast."""
    limits = ("watchdog.stall_s=10", "watchdog.startup_s=600", "--run-dir", run_dir)
    return ranks.run(count, *words, *limits, check=False, meanwhile=meanwhile).returncode


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def told(run_dir: Path, rank: int) -> str:
    return (run_dir / "hang" / f"rank-{rank}.txt").read_text()


def assert_waits_for_data(run_dir: Path) -> None:
    text = told(run_dir, 0)
    assert "in phase 'waiting for data'" in text and "Thread" in text and "loop.py" in text
    assert "last samples: [" in text and "last samples: []" not in text
    assert (run_dir.parent / "again").read_text().split()[1] == "hang"


@pytest.mark.multi
@pytest.mark.slow
def test_a_hung_worker(shards: Path, tmp_path: Path, run_dir: Path) -> None:
    recipe = ranks.recipe(tmp_path, shards, schedule={"steps": 4000})

    def stop_the_worker(pids: list[int]) -> None:
        ranks.until(lambda: len(ranks.curve(run_dir)) >= 3, pids)
        (worker,) = [child for child in children(pids[0]) if b"resource_tracker" not in cmdline(child)]
        os.kill(worker, signal.SIGSTOP)
        while Path(f"/proc/{pids[0]}").exists():
            time.sleep(0.05)
        os.kill(worker, signal.SIGKILL)  # nobody else does, and it holds the pipes that the run prints into

    assert hang(1, run_dir, stop_the_worker, "mimscale", "train", recipe, "data.workers=1") == EXIT_CODE
    assert_waits_for_data(run_dir)


@pytest.mark.multi
@pytest.mark.slow
def test_a_file_read_that_never_returns(shards: Path, tmp_path: Path, run_dir: Path) -> None:
    """The shards that the run has open turn to noise; opened anew, as damage makes it do, they are mute."""
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    recipe = ranks.recipe(tmp_path, copy, schedule={"steps": 4000})

    def mute_the_shards(pids: list[int]) -> None:
        ranks.until(lambda: len(ranks.curve(run_dir)) >= 6, pids)
        for path in sorted(copy.glob("*.tar")):
            with path.open("r+b") as file:
                path.unlink()
                os.mkfifo(path)  # nobody ever writes to it
                file.write(bytes(1 << 20))

    assert hang(1, run_dir, mute_the_shards, "mimscale", "train", recipe, "data.workers=0") == EXIT_CODE
    assert_waits_for_data(run_dir)
    assert "in __init__" in told(run_dir, 0) and "shard_files.py" in told(run_dir, 0)


@pytest.mark.multi
@pytest.mark.slow
def test_a_hung_rank_ends_the_run_and_it_goes_on_afterwards(shards: Path, tmp_path: Path, run_dir: Path) -> None:
    recipe, faults = ranks.recipe(tmp_path, shards), tmp_path / "faults.json"
    faults.write_text(json.dumps({"stops": [9], "rank": 1}))

    def kill_the_hung_rank(pids: list[int]) -> None:
        ranks.until((run_dir / "hang" / "rank-0.txt").exists, pids)
        os.kill(pids[1], signal.SIGKILL)  # a launcher would, after a while

    assert hang(2, run_dir, kill_the_hung_rank, "tests.faulty", faults, "train", recipe) != 0
    assert "after step" in told(run_dir, 0) and " (number " in told(run_dir, 0)
    step, why = (tmp_path / "again").read_text().split()
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
