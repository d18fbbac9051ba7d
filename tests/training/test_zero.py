"""Every ZeRO stage trains what plain PyTorch DDP trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import ranks

pytestmark = [pytest.mark.multi, pytest.mark.slow]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> tuple[Path, dict[str, list[float]]]:
    """Losses and gradient norms of a plain DDP loop, two ranks, two micro-steps per step."""
    folder = tmp_path_factory.mktemp("ddp")
    recipe = ranks.recipe(folder, shards, engine={"max_micro_batch": 4}, optim={"clip": 0.6})
    ranks.run(2, "tests.training.ddp_reference", recipe, folder / "reference.json")
    return recipe, json.loads((folder / "reference.json").read_text())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_loss_curve_equals_ddp(stage: int, ddp: tuple[Path, dict[str, list[float]]], tmp_path: Path) -> None:
    recipe, reference = ddp
    watched = ["log.panels=5", "log.tensorboard=true"]  # drawing panels must not change a run
    ranks.train(2, recipe, tmp_path / "run", f"engine.ds_config=cpu_zero{stage}_fp32", *watched)
    assert list(ranks.curve(tmp_path / "run").values()) == pytest.approx(reference["loss"], abs=1e-6)
    assert list(ranks.curve(tmp_path / "run", "grad_norm").values()) == pytest.approx(reference["norm"], rel=1e-5)
    assert list(ranks.curve(tmp_path / "run", "lr").values()) == pytest.approx(reference["lr"], rel=1e-12)
    assert min(reference["norm"]) < 0.6 < max(reference["norm"])  # some steps are clipped, others not
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [image.step for image in board.Images("view")] == [5, 10, 12]
    assert [scalar.value for scalar in board.Scalars("loss")] == pytest.approx(reference["loss"], abs=1e-6)


@pytest.mark.parametrize(("stage", "precision"), [(2, "bf16"), (3, "fp16")])
def test_16_bit_stays_near_fp32(
    stage: int, precision: str, ddp: tuple[Path, dict[str, list[float]]], tmp_path: Path
) -> None:
    recipe, reference = ddp
    override = [f"engine.ds_config=cpu_zero{stage}_{precision}", "engine.activation_checkpointing=2"]
    ranks.train(2, recipe, tmp_path / "run", *override)
    assert list(ranks.curve(tmp_path / "run").values()) == pytest.approx(reference["loss"], abs=2e-2)
    assert ranks.meta(tmp_path / "run")["engine"]["counters"]["skipped_steps"] == 0
