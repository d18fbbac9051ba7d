"""The tiny recipes, run as a newcomer runs them: each reaches the loss that its header promises."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

import pytest

from data_prep.__main__ import main as data_prep
from mimscale.config.recipes import load_recipe, recipe_names
from mimscale.config.run import method_names
from tests import ranks

TINY = [name for name in recipe_names() if name.endswith("_tiny")]


def promised(name: str) -> float:
    """The loss in the header; it lies midway to what a method reaches whose encoder sees nothing."""
    text = resources.files("mimscale.recipes").joinpath(f"{name}.yaml").read_text()
    (number,) = re.findall(r"^# Expected result: the loss falls below ([\d.]+):", text, re.MULTILINE)
    return float(number)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All of them, in one process."""
    folder = tmp_path_factory.mktemp("tiny")
    assert data_prep(["synthetic", str(folder / "images")]) == 0
    assert data_prep(["folder", str(folder / "images"), str(folder / "shards")]) == 0
    done = {name: folder / name for name in TINY}
    words = [[name, f"data.shards={folder / 'shards'}", "--run-dir", str(run_dir)] for name, run_dir in done.items()]
    (folder / "runs.json").write_text(json.dumps(words))
    ranks.run(1, "tests.training.several", folder / "runs.json")
    return done


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_the_loss_falls_as_promised(name: str, runs: dict[str, Path]) -> None:
    curve = ranks.curve(runs[name])
    assert curve[load_recipe(name).schedule.steps or 0] < promised(name)
    assert list((runs[name] / "tensorboard").glob("events.*"))


def test_every_method_that_pretrains_has_one() -> None:
    assert {load_recipe(name).method.name for name in TINY} == set(method_names()) - {"finetune", "linear_probe"}
