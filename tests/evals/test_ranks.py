"""`mimscale evaluate` as several processes: the same numbers as one."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from mimscale.__main__ import main
from mimscale.data.synthetic import make_image_folder
from tests import ranks
from tests.evals.conftest import save_run, shards, small_run

COMMON = ("--workers", "0", "--crop-pct", "1", "--device", "cpu", "--pool", "mean", "cls", "--batch", "16")


@pytest.mark.parametrize(
    ("protocol", "cache", "counts"),
    [
        ("knn", "--cache", (2, 4)),
        ("knn", "--no-cache", (2,)),
        ("linear", "--cache", (2, 4)),
        ("lowshot", "--cache", (2,)),
    ],
)
def test_all_ranks_together_report_what_one_reports(
    data: tuple[Path, Path], tmp_path: Path, protocol: str, cache: str, counts: tuple[int, ...]
) -> None:
    run_dir = save_run(tmp_path / "mae", small_run("mae"))

    def words(count: int) -> list[str]:
        where = [] if cache == "--no-cache" else [str(tmp_path / f"cache-{count}")]
        sets = ["--train", str(data[0]), "--val", str(data[1]), "--out", str(tmp_path / f"{count}.json")]
        return ["evaluate", protocol, str(run_dir), *sets, *COMMON, cache, *where]

    assert main(words(1)) == 0
    expected = json.loads((tmp_path / "1.json").read_text())["rows"]
    for count in counts:
        done = ranks.run(count, "mimscale", *words(count))
        assert done.stdout.count("wrote") == 1
        report = json.loads((tmp_path / f"{count}.json").read_text())
        assert report["ranks"] == count and report["rows"] == expected  # to the bit


def test_what_is_wrong_is_said_once(data: tuple[Path, Path], tmp_path: Path) -> None:
    run_dir = save_run(tmp_path / "mae", small_run("mae"))
    words = ("--train", data[0], "--val", data[0], *COMMON)
    done = ranks.run(2, "mimscale", "evaluate", "knn", run_dir, *words, check=False)
    assert done.returncode and done.stderr.count("is the training set itself") == 1 and "Traceback" not in done.stderr


def test_ctrl_c_ends_a_rank_that_waits_for_another(data: tuple[Path, Path], tmp_path: Path) -> None:
    images = make_image_folder(tmp_path / "images", classes=3, per_class=500, side=32, seed=2)
    train, run_dir = shards(images, tmp_path / "train"), save_run(tmp_path / "mae", small_run("mae"))
    cache, left = tmp_path / "cache", list[int]()

    def interrupt(pids: list[int]) -> None:
        ranks.until(lambda: list(cache.glob("mean-*/part-*")), pids)
        os.kill(pids[1], signal.SIGSTOP)
        before = -1
        while (now := _cpu_ticks(pids[0])) > before:  # until it waits
            before = now
            time.sleep(3)
        os.kill(pids[0], signal.SIGINT)
        end_s = time.monotonic() + 60
        while Path(f"/proc/{pids[0]}").exists() and time.monotonic() < end_s:
            time.sleep(0.05)
        left.extend(pid for pid in pids[:1] if Path(f"/proc/{pid}").exists())
        os.kill(pids[1], signal.SIGKILL)

    words = ("evaluate", "knn", run_dir, "--train", train, "--val", data[1], *COMMON[:-2], "--cache", cache)
    done = ranks.run(2, "mimscale", *words, check=False, meanwhile=interrupt)
    assert not left and done.returncode and "Traceback" not in done.stderr


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return int(fields[11]) + int(fields[12])
