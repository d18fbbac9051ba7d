"""kill -9 at random moments, many times: the result equals that of an uninterrupted run."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mimscale.data.manifest import Manifest
from mimscale.data.synthetic import make_image_folder

KILLS = 30
SHARDS = 20


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def finished_shards(folder: Path) -> int:
    return len(list(folder.glob("shard-*.json")))


@pytest.mark.multi
@pytest.mark.slow
def test_thirty_times(tmp_path: Path) -> None:
    """Runs are killed 30 times in all. When a run completes, the next one gets a new folder; all results are compared.

    Every fifth run has two writers.
    """
    images = make_image_folder(tmp_path / "images", classes=2, per_class=50, side=48)
    command = [sys.executable, "-m", "data_prep", "folder", str(images), "--shard-samples", "5"]

    def start(folder: Path, jobs: int) -> subprocess.Popen[bytes]:
        words = [*command, "--short-side", "40", "--jobs", str(jobs), str(folder)]
        return subprocess.Popen(words, stderr=subprocess.DEVNULL, start_new_session=True)

    assert start(tmp_path / "uninterrupted", 1).wait() == 0
    expected = files(tmp_path / "uninterrupted")
    assert len(Manifest.load(tmp_path / "uninterrupted").counts) == SHARDS

    rng, kills, moments = random.Random(0), 0, set()
    folders = [tmp_path / "killed 0"]
    while kills < KILLS:
        target = finished_shards(folders[-1]) + rng.randrange(6)
        process = start(folders[-1], jobs=1 + (kills % 5 == 4))
        while process.poll() is None and finished_shards(folders[-1]) < target:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        if process.wait() == 0:
            folders.append(tmp_path / f"killed {len(folders)}")
        else:
            moments.add((len(folders), finished_shards(folders[-1])))
    for folder in folders:
        assert start(folder, jobs=1).wait() == 0
        assert files(folder) == expected
    assert len(moments) > KILLS / 3, "too few kills at different moments"


@pytest.mark.multi
def test_a_worker_that_the_system_kills(tmp_path: Path) -> None:
    images = make_image_folder(tmp_path / "images", classes=2, per_class=20, side=48)
    data_prep = [sys.executable, "-m", "data_prep"]
    make = [*data_prep, "folder", str(images), str(tmp_path / "out"), "--shard-samples", "2"]
    subprocess.run(make, check=True, capture_output=True)
    command = [*data_prep, "verify", str(tmp_path / "out"), "--jobs", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    workers: list[int] = []
    while not workers and process.poll() is None:
        for task in Path(f"/proc/{process.pid}/task").glob("*/children"):
            children = task.read_text().split()
            workers += [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    printed = process.communicate()[1]
    assert process.returncode == 2 and "Traceback" not in printed
    assert printed.splitlines()[-1].startswith("data_prep: a worker process was killed, ")
    assert subprocess.run(command, capture_output=True).returncode == 0
