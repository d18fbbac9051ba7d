"""`mimscale evaluate` as several processes: the same numbers as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mimscale.__main__ import main
from tests import ranks
from tests.evals.conftest import save_run, small_run

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
