"""What AMT learns between steps is saved, cut over the ranks, and the same for any number of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mimscale.checkpoint import format as checkpoint
from mimscale.masking.amt import UNKNOWN
from tests import ranks

pytestmark = [pytest.mark.multi, pytest.mark.slow]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    return ranks.recipe(tmp_path_factory.mktemp("amt"), shards, "amt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """Two ranks, ZeRO-2, never stopped."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    ranks.train(2, recipe, run_dir)
    return run_dir


def table(run_dir: Path) -> torch.Tensor:
    return ranks.tensors(run_dir)["table|masking"].view(80, 16).int()


def assert_same_run(one: Path, two: Path) -> None:
    """Up to fp32 rounding, which may tip a byte of the table over."""
    assert list(ranks.curve(one).values()) == pytest.approx(list(ranks.curve(two).values()), abs=1e-6)
    assert (table(one) - table(two)).abs().max() <= 1
    assert ranks.difference(one, two) < 1e-4


def test_the_table_is_cut_over_the_ranks(whole: Path) -> None:
    """12 steps of 16 of 80 samples, 5 whole images in each: 60 refreshed rows, some of them twice."""
    path = checkpoint.newest(whole)
    assert path is not None
    shards = json.loads((path / "manifest.json").read_text())["shards"]
    pieces = [row[2:] for shard in shards for row in shard["fragments"] if row[1] == "masking"]
    assert pieces == [[0, 640], [640, 640]]
    known = (table(whole) != UNKNOWN).any(dim=1).sum()
    assert 35 <= known <= 60
    assert table(whole).max() == UNKNOWN and table(whole)[(table(whole) != UNKNOWN).any(dim=1)].float().std() > 10


def test_zero_3_accumulation_and_panels_change_nothing(recipe: Path, whole: Path, tmp_path: Path) -> None:
    changes = ["engine.ds_config=cpu_zero3_fp32", "engine.max_micro_batch=4", "log.panels=5"]
    ranks.train(2, recipe, tmp_path / "run", *changes)
    assert_same_run(tmp_path / "run", whole)


def test_zero_0_trains_the_same(recipe: Path, whole: Path, tmp_path: Path) -> None:
    ranks.train(1, recipe, tmp_path / "run", "engine.ds_config=cpu_zero0_fp32")
    assert_same_run(tmp_path / "run", whole)


def test_resumed_is_bit_identical(recipe: Path, whole: Path, tmp_path: Path) -> None:
    ranks.cut_back(whole, tmp_path / "run", 8)
    ranks.train(2, recipe, tmp_path / "run")
    assert ranks.identical(tmp_path / "run", whole)


def test_one_rank_goes_on_where_two_stopped_under_zero_3_with_accumulation(
    recipe: Path, whole: Path, tmp_path: Path
) -> None:
    ranks.cut_back(whole, tmp_path / "run", 4)
    ranks.train(1, recipe, tmp_path / "run", "engine.ds_config=cpu_zero3_fp32", "engine.max_micro_batch=4")
    assert_same_run(tmp_path / "run", whole)


def test_the_warm_up_is_plain_mae(shards: Path, whole: Path, tmp_path: Path) -> None:
    ranks.train(1, ranks.recipe(tmp_path, shards, "mae"), tmp_path / "run")
    ours, theirs = ranks.curve(whole), ranks.curve(tmp_path / "run")
    assert [ours[step] for step in (1, 2)] == pytest.approx([theirs[step] for step in (1, 2)], abs=1e-6)
    assert all(abs(ours[step] - theirs[step]) > 1e-4 for step in range(3, 13))
