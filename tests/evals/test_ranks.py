"""`mimscale evaluate` as several processes: the same numbers as one, and a killed job goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import ranks
from tests.evals.conftest import save_run, small_run

COMMON = ("--workers", "0", "--crop-pct", "1", "--device", "cpu", "--pool", "mean", "cls", "--batch", "16")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return save_run(tmp_path / "mae", small_run("mae"))


def evaluate(count: int, protocol: str, run_dir: Path, data: tuple[Path, Path], out: Path, *more: str) -> list[Any]:
    words: tuple[str | Path, ...] = ("--train", data[0], "--val", data[1], *COMMON, *more, "--out", out)
    done = ranks.run(count, "mimscale", "evaluate", protocol, run_dir, *words)
    assert done.stdout.count("wrote") == 1
    rows: list[Any] = json.loads(out.read_text())["rows"]
    return rows


@pytest.mark.parametrize(
    ("protocol", "cache"), [("knn", "--cache"), ("knn", "--no-cache"), ("linear", "--cache"), ("lowshot", "--cache")]
)
def test_one_two_and_four_ranks_agree(
    data: tuple[Path, Path], run_dir: Path, tmp_path: Path, protocol: str, cache: str
) -> None:
    found = {}
    for count in (1, 2, 4):
        flags = (cache,) if cache == "--no-cache" else (cache, str(tmp_path / f"of-{count}"))
        found[count] = evaluate(count, protocol, run_dir, data, tmp_path / f"{count}.json", *flags, "--baselines")
    assert found[1] == found[2] == found[4]
