"""The demo, as a newcomer runs it: one seed, and half of the margins that three seeds have to reach."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimscale.config import load

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(its folder, what it printed)."""
    out = tmp_path_factory.mktemp("demo")
    done = demonstrate(out, "--check", "0.5")
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def demonstrate(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "jobs/demo.py", "--out", str(out), *words]
    environment = {**os.environ, "COLUMNS": "160"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.multi
@pytest.mark.slow
def test_results(demo: tuple[Path, str]) -> None:
    """The margins themselves are asserted by --check."""
    out, printed = demo
    (scores,) = json.loads((out / "demo.json").read_text())["scores"]
    assert list(scores) == ["raw pixels", "random init", "teacher", "mae", "control", "maskalign"]
    assert all(10 < value <= 100 for row in scores.values() for value in row.values())
    assert all(row.keys() == {"knn", "linear", "few_shot"} for row in scores.values())
    table = (out / "demo.md").read_text()
    for text in (printed, table):
        assert f"{scores['maskalign']['knn']:.1f}" in text and "4,000 MNIST digits with labels" in text
    assert "MAE against random initialisation" in table
    assert "tensorboard --logdir" in printed


@pytest.mark.multi
@pytest.mark.slow
def test_files(demo: tuple[Path, str]) -> None:
    out, _ = demo
    with Image.open(out / "demo.png") as picture:
        assert picture.width > 800 and picture.height > 400
        assert len(np.unique(np.asarray(picture.convert("L")))) > 100
    for name in ("teacher", "mae", "control", "maskalign"):
        run = out / "seed-0" / name
        assert list((run / "tensorboard").glob("events.*"))
        losses = [m["loss"] for m in map(json.loads, (run / "metrics.jsonl").open()) if "loss" in m]
        assert losses[-1] < 0.8 * losses[0]
    data = json.loads((out / "shards" / "digits-unlabelled" / "manifest.json").read_text())
    assert data["samples"] == 1297 and data["labelled"] is False


@pytest.mark.multi
@pytest.mark.slow
def test_margins_that_are_not_reached_fail_and_nothing_is_trained_again(demo: tuple[Path, str]) -> None:
    out, _ = demo
    before = {path: path.stat().st_mtime_ns for path in (out / "seed-0").glob("*/checkpoints/*/manifest.json")}
    assert len(before) == 4
    again = demonstrate(out, "--check", "100")
    assert again.returncode == 1 and "not reached" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_recipes_of_all_students_are_valid() -> None:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "jobs" / "demo.py")
    assert spec is not None and spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    methods = {name: load(recipe, changes).method.name for name, (_, recipe, changes) in demo.EXTRAS.items()}
    assert methods == {"mff": "mff", "amt": "mae", "convmae": "convmae", "mrmae": "mrmae", "mrmae_convmae": "mrmae"}
    assert demo.rows(False).keys() < demo.rows(True).keys() and demo.rows(True).keys() >= methods.keys()
