"""A run on several data sets with weights: what it prints, and what a resume refuses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from data_prep.__main__ import main
from mimscale.data.synthetic import make_image_folder
from tests import ranks

pytestmark = [pytest.mark.slow]


def sets(folder: Path) -> list[str]:
    """Two data sets of other images."""
    places = []
    for seed in (1, 2):
        make_image_folder(folder / f"images{seed}", classes=2, per_class=16, side=40, seed=seed)
        places.append(str(folder / f"shards{seed}"))
        assert main(["folder", str(folder / f"images{seed}"), places[-1], "--shard-samples", "16"]) == 0
    return places


def test_weights_are_printed_and_may_not_change_at_a_resume(tmp_path: Path) -> None:
    one, two = sets(tmp_path)

    def start(weights: Mapping[str, float], code: int = 0) -> str:
        sections: dict[str, Any] = {"schedule": {"steps": 6, "warmup_epochs": 0}, "data": {"shards": weights}}
        recipe = ranks.recipe(tmp_path, tmp_path, **sections, checkpoint={"every": 2}, student={"depth": 1})
        done = ranks.run(1, "mimscale", "train", recipe, "--run-dir", tmp_path / "run", check=False)
        assert done.returncode == code, done.stderr[-3000:]
        return done.stderr

    said = start({one: 3, two: 1})
    assert f"mixture: 75.00% from {one} (32 samples), 25.00% from {two} (32 samples)" in said
    ranks.cut_back(tmp_path / "run", tmp_path / "killed", 4)
    (tmp_path / "run").rename(tmp_path / "whole")
    (tmp_path / "killed").rename(tmp_path / "run")
    for other in ({one: 1, two: 3}, {one: 3}):
        line = start(other, code=2).strip().splitlines()[-1]
        assert "holds other samples, or mixes them with other weights" in line, line
    start({one: 0.75, two: 0.25})  # the same shares
    assert ranks.identical(tmp_path / "whole", tmp_path / "run")
