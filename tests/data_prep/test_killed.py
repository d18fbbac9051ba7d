"""kill -9 at random moments, many times over: what is there at the end is what an undisturbed run makes."""

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


def finished(folder: Path) -> int:
    return len(list(folder.glob("shard-*.json")))


@pytest.mark.multi
@pytest.mark.slow
def test_thirty_times(tmp_path: Path) -> None:
    """Runs are killed until there were 30 kills; whenever one gets through, its result is compared and a new folder
    begun. Every fifth run has two writers.
    """
    pictures = make_image_folder(tmp_path / "pictures", classes=2, per_class=50, side=48)
    command = [sys.executable, "-m", "data_prep", "folder", str(pictures), "--shard-samples", "5"]

    def start(folder: Path, jobs: int) -> subprocess.Popen[bytes]:
        words = [*command, "--short-side", "40", "--jobs", str(jobs), str(folder)]
        return subprocess.Popen(words, stderr=subprocess.DEVNULL, start_new_session=True)

    assert start(tmp_path / "whole", 1).wait() == 0
    expected = files(tmp_path / "whole")
    assert len(Manifest.load(tmp_path / "whole").counts) == SHARDS

    chance, kills, moments = random.Random(0), 0, set()
    folders = [tmp_path / "broken 0"]
    while kills < KILLS:
        target = finished(folders[-1]) + chance.randrange(6)
        running = start(folders[-1], jobs=1 + (kills % 5 == 4))
        while running.poll() is None and finished(folders[-1]) < target:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            kills += 1
        if running.wait() == 0:
            folders.append(tmp_path / f"broken {len(folders)}")
        else:
            moments.add((len(folders), finished(folders[-1])))
    for folder in folders:
        assert start(folder, jobs=1).wait() == 0
        assert files(folder) == expected
    assert len(moments) > KILLS / 3, "the kills did not come at different moments"
