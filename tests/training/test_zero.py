"""Both engines and every ZeRO stage train what a hand-written loop in plain PyTorch trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import ranks

pytestmark = [pytest.mark.multi, pytest.mark.slow]
Curves = dict[str, list[float]]


def curves(run_dir: Path) -> Curves:
    names = {"loss": "loss", "norm": "grad_norm", "lr": "lr"}
    return {name: list(ranks.curve(run_dir, logged).values()) for name, logged in names.items()}


def assert_equal(ours: Curves, theirs: Curves) -> None:
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
    assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-5)
    assert ours["lr"] == pytest.approx(theirs["lr"], rel=1e-12)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """Two ranks, two micro-steps per step."""
    return ranks.recipe(tmp_path_factory.mktemp("zero"), shards, engine={"max_micro_batch": 4}, optim={"clip": 0.6})


@pytest.fixture(scope="module")
def torch_engine(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Curves:
    """The trainer with the engine in plain PyTorch, the reference for DeepSpeed's."""
    run_dir = tmp_path_factory.mktemp("torch") / "run"
    ranks.train(2, recipe, run_dir, "engine.backend=torch", "engine.ds_config=cpu_zero2_fp32")
    return curves(run_dir)


def test_the_trainer_equals_a_hand_written_loop(recipe: Path, torch_engine: Curves, tmp_path: Path) -> None:
    ranks.run(2, "tests.training.plain_pytorch", recipe, tmp_path / "plain.json")
    plain: Curves = json.loads((tmp_path / "plain.json").read_text())
    assert_equal(torch_engine, plain)
    assert min(plain["norm"]) < 0.6 < max(plain["norm"])  # some steps are clipped, others not


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_equals_plain_pytorch(stage: int, recipe: Path, torch_engine: Curves, tmp_path: Path) -> None:
    watched = ["log.panels=5", "log.trackers=[tensorboard]"]  # drawing panels must not change a run
    ranks.train(2, recipe, tmp_path / "run", f"engine.ds_config=cpu_zero{stage}_fp32", *watched)
    assert_equal(curves(tmp_path / "run"), torch_engine)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [image.step for image in board.Images("view")] == [5, 10, 12]
    assert [scalar.value for scalar in board.Scalars("loss")] == pytest.approx(torch_engine["loss"], abs=1e-6)


@pytest.mark.parametrize(("name", "backend"), [("2_bf16", "deepspeed"), ("3_fp16", "deepspeed"), ("2_bf16", "torch")])
def test_16_bit_stays_near_fp32(name: str, backend: str, recipe: Path, torch_engine: Curves, tmp_path: Path) -> None:
    override = [f"engine.backend={backend}", f"engine.ds_config=cpu_zero{name}", "engine.activation_checkpointing=2"]
    ranks.train(2, recipe, tmp_path / "run", *override)
    losses = curves(tmp_path / "run")["loss"]
    assert losses == pytest.approx(torch_engine["loss"], abs=2e-2) and losses != torch_engine["loss"]
    assert ranks.meta(tmp_path / "run")["engine"]["counters"]["skipped_steps"] == 0
