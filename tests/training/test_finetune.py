"""Fine-tuning with everything on, in the real trainer: ranks, stages, a resume, and the accuracy while it trains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data_prep.__main__ import main as data_prep
from mimscale.__main__ import main
from mimscale.data.synthetic import make_image_folder
from tests import ranks

pytestmark = [pytest.mark.multi, pytest.mark.slow]
METHOD = {"name": "finetune", "classes": 4, "mixup": 0.8, "cutmix": 1.0, "head_std": 0.02}
DATA = {"rand_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25, "colour_jitter": [0.4, 0.4, 0.4], "workers": 0}
STEPS = 10  # two epochs of 80 images


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("val")
    make_image_folder(root / "images", classes=4, per_class=7, side=48, seed=1)
    assert data_prep(["folder", str(root / "images"), str(root / "shards"), "--shard-samples", "9"]) == 0
    return root / "shards"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards: Path, val: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    sections: dict[str, dict[str, Any]] = {
        "method": METHOD,
        "data": DATA,
        "optim": {"layer_decay": 0.75},
        "ema": {"decay": 0.9},
        "schedule": {"steps": STEPS},
        "checkpoint": {"every": 5},
    }
    recipe = ranks.recipe(folder, shards, "finetune", **sections)
    evals = [f"evals.val={val}", "evals.top1_epochs=1", "evals.protocols={}", "evals.batch=5"]

    def train(count: int, *words_of: Sequence[str]) -> None:
        listed = folder / "runs.json"
        listed.write_text(json.dumps([[str(recipe), "--run-dir", str(folder / name), *w] for name, *w in words_of]))
        ranks.run(count, "tests.training.several", listed)

    train(
        2,
        ("zero0", "engine.ds_config=cpu_zero0_fp32"),
        ("zero2", "engine.max_micro_batch=3"),
        ("zero3", "engine.ds_config=cpu_zero3_fp32", *evals),
        ("plain3", "engine.ds_config=cpu_zero3_fp32"),
    )
    ranks.cut_back(folder / "zero3", folder / "resumed", 5)
    train(2, ("resumed", "engine.ds_config=cpu_zero3_fp32", *evals))
    train(1, ("alone", "engine.max_micro_batch=1"), ("torch", "engine.backend=torch", "engine.max_micro_batch=16"))
    return folder


@pytest.mark.parametrize("name", ["zero2", "zero3", "alone", "torch"])
def test_one_loss_curve(runs: Path, name: str) -> None:
    """Whatever the stage, the ranks, the micro-batch (8, 2 and 1, 16) and the engine."""
    expected = ranks.curve(runs / "zero0")
    assert list(expected) == list(range(1, STEPS + 1))
    assert ranks.curve(runs / name) == pytest.approx(expected, rel=2e-5)


def test_resumed_equals_uninterrupted(runs: Path) -> None:
    assert ranks.identical(runs / "resumed", runs / "zero3")


def test_measuring_accuracy_changes_nothing(runs: Path) -> None:
    assert ranks.identical(runs / "plain3", runs / "zero3")
    assert ranks.curve(runs / "plain3") == ranks.curve(runs / "zero3")


def test_accuracy_while_training_is_that_of_the_checkpoint(runs: Path, val: Path) -> None:
    events = [line for line in ranks.lines(runs / "zero3") if line.get("event") == "evals" and "top1" in line]
    measured = {line["at"]: line["top1"] for line in events}
    assert list(measured) == [5, 10]
    for step, expected in measured.items():
        checkpoint = runs / "zero3" / "checkpoints" / f"step-{step:08d}"
        out = runs / f"{step}.json"
        words = [str(checkpoint), "--val", str(val), "--workers", "0", "--device", "cpu", "--out", str(out)]
        assert main(["evaluate", "top1", *words]) == 0
        assert json.loads(out.read_text())["rows"][0]["top1"] == expected


def test_two_ranks_measure_what_one_does(runs: Path, val: Path) -> None:
    reports = []
    for count in (1, 2):
        out = runs / f"ranks{count}.json"
        words: list[str | Path] = [runs / "zero2", "--ema", "--val", val, "--workers", "0", "--device", "cpu"]
        words += ["--batch", "5", "--out", out]
        ranks.run(count, "mimscale", "evaluate", "top1", *words)
        reports.append(json.loads(out.read_text()))
    one, two = (report["rows"] for report in reports)
    assert one == two and one[0]["samples"] == 28


def test_the_average_holds_the_head(runs: Path) -> None:
    names = {name for name in ranks.tensors(runs / "zero2") if name.startswith("ema|")}
    assert {"ema|head.weight", "ema|fc_norm.bias", "ema|student.cls_token"} <= names


def test_accuracy_of_what_is_no_classifier(
    tmp_path: Path, shards: Path, val: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"evals.val={val}", "evals.top1_epochs=1", "evals.protocols={}", "--run-dir", str(tmp_path / "run")]
    assert main(["train", str(ranks.recipe(tmp_path, shards)), *words]) == 2
    assert "evals.top1_epochs = 1: method mae is no classifier; set it to null" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
