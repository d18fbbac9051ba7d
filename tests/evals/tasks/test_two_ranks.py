"""Tasks as two processes: the numbers of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mimscale.__main__ import main
from tests import ranks

QUICK = ["--workers", "0", "--crop-pct", "1", "--device", "cpu", "--no-cache"]


@pytest.mark.multi
@pytest.mark.parametrize("task", ["transfer", "robustness"])
def test_two_ranks_agree_with_one(data: tuple[Path, Path], run_dir: Path, tmp_path: Path, task: str) -> None:
    train, val = data
    own = (
        ["--sets", f"shapes={train}:{val}", "--protocols", "knn"]
        if task == "transfer"
        else ["--train", train, "--sets", f"shapes={val}"]
    )
    words = ["evaluate", task, run_dir, *own, *QUICK, "--out"]
    assert main([*map(str, words), str(tmp_path / "1.json")]) == 0
    done = ranks.run(2, "mimscale", *words, tmp_path / "2.json")
    assert done.stdout.count("wrote") == 1
    assert rows(tmp_path / "1.json") == rows(tmp_path / "2.json")


def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return found
