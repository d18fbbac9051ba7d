"""The demo as a newcomer runs it, but with fewer epochs: one seed, half of the margins that three have to reach."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimscale.config.recipes import load_recipe
from tests.scripts import ROOT, load_script

pytestmark = pytest.mark.timeout(2400)  # everything is trained on behalf of the first test
SHORT = (
    "teacher:schedule.epochs=8",
    "control:schedule.epochs=16",
    "maskalign:schedule.epochs=16",
    "mae:schedule.epochs=5",  # no margin of MAE's is asserted
    "mae:schedule.warmup_epochs=1",
)
DEMO = "jobs/demo.py"
NETWORKS = ["raw pixels", "random init", "teacher", "mae", "control", "maskalign"]


def demonstrate(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, DEMO, *words]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "COLUMNS": "160"}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(its folder, what it printed)."""
    out = tmp_path_factory.mktemp("demo")
    done = demonstrate("--out", out, "--check", "0.5", *(word for change in SHORT for word in ("--set", change)))
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


@pytest.mark.multi
@pytest.mark.slow
def test_results(demo: tuple[Path, str]) -> None:
    """The margins themselves are asserted by --check."""
    out, printed = demo
    (scores,) = json.loads((out / "demo.json").read_text())["scores"]
    assert list(scores) == NETWORKS
    assert all(10 < value <= 100 for row in scores.values() for value in row.values())
    assert all(row.keys() == {"knn", "linear", "lowshot"} for row in scores.values())
    table = (out / "demo.md").read_text()
    for text in (printed, table):
        assert f"{scores['maskalign']['knn']:.1f}" in text and "4,000 MNIST digits with labels" in text
    assert "MAE against random initialisation" in table
    assert "tensorboard --logdir" in printed and "--set mae:schedule.epochs=5" in table


@pytest.mark.multi
@pytest.mark.slow
def test_files(demo: tuple[Path, str]) -> None:
    out, _ = demo
    with Image.open(out / "demo.png") as figure:
        assert figure.width > 800 and figure.height > 400
        assert len(np.unique(np.asarray(figure.convert("L")))) > 100
    for name in ("teacher", "mae", "control", "maskalign"):
        run = out / "seed-0" / name
        assert list((run / "tensorboard").glob("events.*"))
        losses = [m["loss"] for m in map(json.loads, (run / "metrics.jsonl").open()) if "loss" in m]
        assert losses[-1] < 0.8 * losses[0]
    data = json.loads((out / "shards" / "digits-unlabelled" / "manifest.json").read_text())
    assert data["samples"] == 1297 and data["labelled"] is False


@pytest.mark.multi
@pytest.mark.slow
def test_a_second_call_trains_nothing_again(demo: tuple[Path, str]) -> None:
    out, _ = demo
    before = {path: path.stat().st_mtime_ns for path in (out / "seed-0").glob("*/checkpoints/*/manifest.json")}
    assert len(before) == 4
    again = load_script(DEMO)
    stage = again.Stages(out / "logs")
    again.pretrain(out / "seed-0", 0, again.prepare(out, stage), stage, False, SHORT)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_margins_that_are_not_reached_fail(capsys: pytest.CaptureFixture[str]) -> None:
    reached = {name: dict.fromkeys(("knn", "linear", "lowshot"), 50.0) for name in NETWORKS}
    reached["maskalign"] = dict.fromkeys(("knn", "linear", "lowshot"), 62.5)
    demo = load_script(DEMO)
    assert demo.verdict([reached], 1.0) == 0 and "not reached" not in capsys.readouterr().out
    assert demo.verdict([reached], 1.1) == 1
    assert "not reached  kNN: MaskAlign is 12.5 points over random init, not 13.2" in capsys.readouterr().out
    reached["control"]["lowshot"] = 55.0
    assert demo.verdict([reached], 1.0) == 1
    assert "not reached  5-shot: MaskAlign is 7.5 points over control, not 8" in capsys.readouterr().out


def test_a_change_of_no_network_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        load_script(DEMO).main(["--out", str(tmp_path / "out"), "--set", "amt:schedule.epochs=1"])
    assert end.value.code == 2 and not (tmp_path / "out").exists()
    assert "--set amt:schedule.epochs=1: not NETWORK:KEY=VALUE with a network of teacher" in capsys.readouterr().err


def test_the_recipes_of_all_students_are_valid() -> None:
    demo = load_script(DEMO)
    methods = {name: load_recipe(recipe, changes).method.name for name, (_, recipe, changes) in demo.EXTRAS.items()}
    assert methods == {"mff": "mff", "amt": "mae", "convmae": "convmae", "mrmae": "mrmae", "mrmae_convmae": "mrmae"}
    assert demo.rows(False).keys() < demo.rows(True).keys() and demo.rows(True).keys() >= methods.keys()
