"""A run that is evaluated while it trains is the run that is not, to the bit; an evaluation that fails ends nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.__main__ import main as data_prep
from mimscale.__main__ import main
from mimscale.data.manifest import Manifest
from mimscale.data.synthetic import make_image_folder
from tests import ranks

pytestmark = [pytest.mark.multi, pytest.mark.slow]
STAGES, EVERY = (0, 2, 3), 5


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 other images of the training set's classes, in three shards."""
    root = tmp_path_factory.mktemp("val")
    make_image_folder(root / "images", classes=4, per_class=7, side=48, seed=1)
    next((root / "images").rglob("*.jpg")).unlink()  # a count that two ranks do not share evenly
    assert data_prep(["folder", str(root / "images"), str(root / "shards"), "--shard-samples", "9"]) == 0
    return root / "shards"


@pytest.fixture(scope="module")
def damaged(val: Path) -> Path:
    """The same with an image overwritten in the last shard, which rank 0 does not read."""
    folder = val.parent / "damaged"
    shutil.copytree(val, folder)
    manifest = Manifest.load(folder)
    with manifest.shard_paths[-1].open("r+b") as file:
        file.seek(int(manifest.offsets[-1]))
        file.write(b"\0" * int(manifest.sizes[-1]))
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    return ranks.recipe(tmp_path_factory.mktemp("evals"), shards, log={"trackers": ["tensorboard"]})


def on(val: Path) -> list[str]:
    return [f"evals.val={val}", f"evals.every={EVERY}", "evals.protocols={ridge: {}, knn: {}}"]


def train_all(recipe: Path, runs: Sequence[tuple[Path, Sequence[str]]], folder: Path) -> None:
    listed = folder / "runs.json"
    listed.write_text(json.dumps([[str(recipe), *words, "--run-dir", str(run_dir)] for run_dir, words in runs]))
    ranks.run(2, "tests.training.several", listed)


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in ranks.lines(run_dir) if line.get("event") == name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, recipe: Path, val: Path, damaged: Path) -> Path:
    """Two ranks each: at every stage a run with and one without, and one whose validation set cannot be read."""
    folder = tmp_path_factory.mktemp("runs")
    listed = []
    for stage in STAGES:
        config = f"engine.ds_config=cpu_zero{stage}_fp32"
        listed += [(folder / f"off{stage}", [config]), (folder / f"on{stage}", [config, *on(val)])]
    listed.append((folder / "damaged", on(damaged)))
    train_all(recipe, listed, folder)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_training_is_bit_identical_with_it_on_and_off(stage: int, runs: Path) -> None:
    """Weights, moments, buffers, counters; and the loss of every step, so the same samples, masks and dropped paths."""
    off, measured = runs / f"off{stage}", runs / f"on{stage}"
    assert [event["at"] for event in events(measured, "evals")] == [5, 10, 12] and not events(off, "evals")
    assert ranks.identical(measured, off)
    assert ranks.curve(measured) == ranks.curve(off) and len(ranks.curve(off)) == 12


def test_also_over_a_resume(runs: Path, recipe: Path, val: Path, tmp_path: Path) -> None:
    """Each half of the run with it or without it."""
    ranks.cut_back(runs / "on3", tmp_path / "on then off", 8)
    ranks.cut_back(runs / "off2", tmp_path / "off then on", 8)
    zero3, zero2 = (f"engine.ds_config=cpu_zero{stage}_fp32" for stage in (3, 2))
    halves = [(tmp_path / "on then off", [zero3]), (tmp_path / "off then on", [zero2, *on(val)])]
    train_all(recipe, halves, tmp_path)
    assert ranks.identical(tmp_path / "on then off", runs / "off3")
    assert ranks.identical(tmp_path / "off then on", runs / "off2")
    assert [event["at"] for event in events(tmp_path / "off then on", "evals")] == [10, 12]
    whole = events(runs / "on2", "evals")
    for event, expected in zip(events(tmp_path / "off then on", "evals"), whole[1:], strict=True):
        assert {k: event[k] for k in FIGURES} == {k: expected[k] for k in FIGURES}


FIGURES = ("knn", "ridge", "rankme", "spread")


def test_figures_are_those_of_an_evaluation_afterwards(runs: Path, shards: Path, val: Path, tmp_path: Path) -> None:
    """Two ranks at ZeRO-3 in the run, one process afterwards; and they are in TensorBoard."""
    found = events(runs / "on3", "evals")[-1]
    for protocol in ("ridge", "knn"):
        out = tmp_path / f"{protocol}.json"
        words = ["--train", str(shards), "--val", str(val), "--workers", "0", "--device", "cpu", "--out", str(out)]
        assert main(["evaluate", protocol, str(runs / "on3"), *words]) == 0
        assert json.loads(out.read_text())["rows"][-1][protocol] == pytest.approx(found[protocol], abs=1e-3)
    board = EventAccumulator(str(runs / "on3" / "tensorboard"))
    board.Reload()
    for name in FIGURES:
        scalars = board.Scalars(f"evals/{name}")
        assert [s.step for s in scalars] == [5, 10, 12] and scalars[-1].value == pytest.approx(found[name], rel=1e-5)


def test_what_one_rank_cannot_read_ends_nothing(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    failed = events(runs / "damaged", "evals_failed")
    assert [event["at"] for event in failed] == [5, 10, 12] and not events(runs / "damaged", "evals")
    assert all("rank 1" in str(event["error"]) and "DamagedSample" in str(event["error"]) for event in failed)
    assert ranks.identical(runs / "damaged", runs / "off2")


def test_shards_that_vanish_are_asked_for_again(recipe: Path, val: Path, tmp_path: Path) -> None:
    """Gone after the run's checks and back before its end: the second evaluation has figures. The run goes on."""
    copy, gone = tmp_path / "val", tmp_path / "gone"
    shutil.copytree(val, copy)
    words = ["evals.every=2", "evals.protocols={ridge: {}}", "schedule.steps=100000", "checkpoint.every=0"]

    def strike(pids: list[int]) -> None:
        ranks.until(lambda: (tmp_path / "run" / "config.yaml").exists(), pids)  # the checks are over
        copy.rename(gone)
        ranks.until(lambda: events(tmp_path / "run", "evals_failed"), pids)
        gone.rename(copy)
        ranks.until(lambda: events(tmp_path / "run", "evals"), pids)
        (tmp_path / "run" / "stop").touch()

    done = ranks.run(
        1, "mimscale", "train", recipe, f"evals.val={copy}", *words, "--run-dir", tmp_path / "run", meanwhile=strike
    )
    failed, found = events(tmp_path / "run", "evals_failed"), events(tmp_path / "run", "evals")
    assert failed and failed[0]["at"] == 2 and found[0]["at"] > failed[-1]["at"]
    assert "evals at step 2 failed, training goes on: " in done.stderr
