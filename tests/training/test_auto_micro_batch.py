"""`engine.max_micro_batch: auto`: what it becomes, that ranks agree on it, and that a resume keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from mimscale.checkpoint import run_folder
from mimscale.config.recipes import load_recipe
from mimscale.cost.devices import GIB
from mimscale.distributed.coordination import Coordinator
from mimscale.distributed.world import World
from mimscale.errors import UserError
from mimscale.training.auto_micro_batch import ON_CPU, agreed, most_that_fits, resolved, with_micro_batch
from mimscale.training.checked_run import prepare
from tests import ranks

CPU = World(0, 2, 0, torch.device("cpu"))


def test_a_cpu_takes_a_fixed_number_and_a_resume_that_of_the_run() -> None:
    config = load_recipe("mae_vit_l16", ["engine.max_micro_batch=auto"])
    assert resolved(config, None, CPU).engine.max_micro_batch == ON_CPU
    assert resolved(config, with_micro_batch(config, 96), CPU).engine.max_micro_batch == 96
    given = load_recipe("mae_vit_l16")
    assert resolved(given, with_micro_batch(given, 96), CPU) is given


def test_a_gpu_is_filled() -> None:
    """MAE-L took 21.2 GiB with 256 images on an H100 (docs/plan.md), 5 of them whatever the batch: 79 GiB hold 512."""
    config = load_recipe("mae_vit_l16", ["engine.max_micro_batch=auto"])
    assert most_that_fits(config, 8, 79 * GIB) == 512
    assert most_that_fits(config, 8, 16 * GIB) == 128
    assert most_that_fits(config, 8, 1 * GIB) == 1


class Ranks:
    """A coordinator beside one other rank."""

    def __init__(self, other: tuple[bool, int]) -> None:
        self.other = other

    def gather(self, item: Any) -> list[Any]:
        return [item, self.other]


def test_ranks_take_the_least(shards: Path, tmp_path: Path) -> None:
    recipe = ranks.recipe(tmp_path, shards, engine={"max_micro_batch": "auto"})
    checked = prepare(load_recipe(str(recipe)), tmp_path / "run", None, ())
    assert (checked.micro_batch, checked.accumulation, checked.auto_micro_batch) == (16, 1, True)
    other = agreed(checked, cast(Coordinator, Ranks((True, 4))))
    assert (other.micro_batch, other.accumulation, other.config.engine.max_micro_batch) == (4, 4, 4)
    assert agreed(checked, cast(Coordinator, Ranks((True, 512)))) is checked
    different = cast(Coordinator, Ranks((False, 4)))
    assert agreed(checked, different) is checked  # refused right after, because the ranks differ


def test_the_number_is_in_the_runs_config(shards: Path, tmp_path: Path) -> None:
    recipe = ranks.recipe(
        tmp_path, shards, engine={"max_micro_batch": "auto"}, schedule={"steps": 10, "warmup_epochs": 0.1}
    )
    run_dir = tmp_path / "run"
    ranks.train(1, recipe, run_dir)
    stored = run_folder.existing_run(run_dir)
    assert stored is not None and stored.engine.max_micro_batch == ON_CPU


def test_a_batch_that_does_not_divide_is_refused(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = ranks.recipe(tmp_path, shards, engine={"max_micro_batch": "auto"})
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "3",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="does not divide over 3 ranks"):
        prepare(load_recipe(str(recipe)), tmp_path / "run", None, ())
