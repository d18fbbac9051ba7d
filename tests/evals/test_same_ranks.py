"""Ranks of one evaluation that were not given the same end with one line, and measure no mixture of two things."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests import ranks
from tests.evals.conftest import save_run, small_run

COMMON = ("--train", "train", "--val", "val", "--workers", "0", "--device", "cpu", "--no-cache")


def outcome(folder: Path, words: list[list[str]]) -> list[dict[str, object]]:
    """What each of two ranks did: rank R stands in `folder`/nodeR."""
    case = [{"words": mine, "folder": str(folder / f"node{rank}")} for rank, mine in enumerate(words)]
    path = folder / "case.json"
    path.write_text(json.dumps(case))
    ranks.run(2, "tests.training.ranks_apart", path)
    return [json.loads(Path(f"{path}.{rank}").read_text()) for rank in (0, 1)]


@pytest.fixture
def nodes(tmp_path: Path, data: tuple[Path, Path]) -> Path:
    """Two nodes whose copies of the run and of the data are the same."""
    for rank in (0, 1):
        for name, source in zip(("train", "val"), data, strict=True):
            shutil.copytree(source, tmp_path / f"node{rank}" / name)
        save_run(tmp_path / f"node{rank}" / "mae", small_run("mae"))
    return tmp_path


def refused(found: list[dict[str, object]]) -> str:
    """The one line, of rank 0."""
    first, second = (str(one["stderr"]) for one in found)
    lines = [line for line in first.splitlines() if line.startswith("mimscale evaluate: ")]
    assert [one["code"] for one in found] == [2, 2] and len(lines) == 1 and not second, (first, second)
    return lines[0]


@pytest.mark.multi
def test_options(nodes: Path) -> None:
    words = ["evaluate", "knn", "mae", *COMMON]
    line = refused(outcome(nodes, [[*words, "--crop-pct", "1"], [*words, "--seed", "3"]]))
    for part in ("--crop-pct: 1.0 on rank 0 (", ", 0.875 on rank 1 (", "--seed: 0 on rank 0 (", ", 3 on rank 1 ("):
        assert part in line


@pytest.mark.multi
@pytest.mark.parametrize("method", ["mae", "finetune"])
def test_weights_of_one_node_are_older(nodes: Path, method: str) -> None:
    for rank in (0, 1):
        save_run(nodes / f"node{rank}" / "run", small_run(method), step=7 + rank)
    if method == "mae":
        words = ["evaluate", "knn", "run", *COMMON]
        what = "run, mean, of val: network: sha256: "
    else:
        words = ["evaluate", "top1", "run", "--val", "val", "--workers", "0", "--device", "cpu"]
        what = "run: sha256: "
    assert f"the ranks of this launch differ: {what}" in refused(outcome(nodes, [words, words]))


@pytest.mark.multi
def test_data_of_one_node_are_others(nodes: Path) -> None:
    shutil.rmtree(nodes / "node1" / "train")
    shutil.copytree(nodes / "node1" / "val", nodes / "node1" / "train")
    shutil.rmtree(nodes / "node1" / "val")
    shutil.copytree(nodes / "node0" / "train", nodes / "node1" / "val")
    words = ["evaluate", "knn", "mae", *COMMON]
    assert "mae, mean, of val: data: " in refused(outcome(nodes, [words, words]))


@pytest.mark.multi
def test_nodes_may_keep_the_same_in_other_places(nodes: Path) -> None:
    (nodes / "node1" / "val").rename(nodes / "node1" / "other")
    words = ["evaluate", "knn", "mae", *COMMON]
    found = outcome(nodes, [words, ["other" if word == "val" else word for word in words]])
    assert [one["code"] for one in found] == [0, 0], found
