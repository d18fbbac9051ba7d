"""`bench methods`: intervals against a computation by hand, its table, and its cells on a handful of images.

Nothing is asserted about which method is better.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mimscale.__main__ import main
from mimscale.bench import _methods_rows as rows
from mimscale.bench import methods
from mimscale.bench._methods_cell import METRICS, probes, top1_of, write_cell
from mimscale.bench._methods_data import balanced
from mimscale.bench._methods_report import difference, interval, load, main_table, verdict
from mimscale.config.recipes import load_recipe
from mimscale.config.run import method_class
from mimscale.data.manifest import Manifest
from mimscale.errors import UserError
from mimscale.evals.runner import protocol_class
from mimscale.teachers.ensemble import build_skeletons, describe
from tests.data_prep.test_fashion import idx

SMALL = replace(rows.TINY, images=20, test=20, batch=4, steps=2, finetune_steps=2)
STUDENTS = [name for name, row in rows.ROWS.items() if row.kind == "pretrained"]


def write_source(folder: Path, each: int) -> Path:
    """Images of Fashion-MNIST's form; the class is a bright column, so that something can be learned."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for begin in ("train", "t10k"):
        labels = np.repeat(np.arange(10, dtype=np.uint8), each)
        images = random.integers(0, 60, (len(labels), 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[:, 2 * label : 2 * label + 4] += 150
        (folder / f"{begin}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{begin}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cells that were run one after the other in this process."""
    patch = pytest.MonkeyPatch()
    patch.setitem(rows.PRESETS, "tiny", SMALL)
    top = tmp_path_factory.mktemp("methods")
    words = ["--preset", "tiny", "--data", str(write_source(top / "in", 3)), "--out", str(top / "out")]
    assert main(["bench", "methods", *words, "--rows", "pixels", "--seeds", "1", "--forecast"]) == 0
    patch.undo()
    for name, seed in (("pixels", 0), ("mae", 0), ("mae", 1), ("random", 0)):
        write_cell(top / "out", name, seed)
    return top / "out"


def test_cells(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores, cells = load(out)
    assert scores.keys() == {"pixels", "mae", "random"} and len(cells) == 4
    assert scores["mae"][0].keys() == set(probes(SMALL)) | {"finetune"} <= set(METRICS)
    assert scores["pixels"][0].keys() == {"knn", "linear", "lowshot"}
    assert scores["pixels"][0]["linear"] == 100.0
    assert all(0 <= value <= 100 for row in scores.values() for seed in row.values() for value in seed.values())
    assert all(cell["commit"] and cell["seconds"]["all"] > 0 for cell in cells)
    val = Manifest.load(out / "data" / "val")
    tuned = out / "runs" / "mae-0" / "finetune"
    assert top1_of(tuned, val, torch.device("cpu")) == scores["mae"][0]["finetune"]


def test_table_of_what_is_there(out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rows.PRESETS, "tiny", SMALL)
    assert main(["bench", "methods", "--preset", "tiny", "--out", str(out), "--table"]) == 0
    printed = capsys.readouterr().out
    assert "| MAE | 2 |" in printed and "| SimMIM | 0 |" in printed and "MAE - random ViT" in printed
    assert "not measured" in printed and "one seed" not in printed
    assert (out / "methods.md").read_text() in printed
    report = json.loads((out / "methods.json").read_text())
    assert report["intervals"]["mae"]["knn"]["seeds"] == 2 and len(report["cells"]) == 4
    monkeypatch.setitem(rows.PRESETS, "tiny", replace(SMALL, steps=3))
    assert main(["bench", "methods", "--preset", "tiny", "--out", str(out), "--table"]) == 2
    assert "holds cells of other sizes" in capsys.readouterr().err


@pytest.mark.multi
@pytest.mark.slow
def test_processes_resume_and_a_failure_costs_one_cell(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """teacher cannot be built in a run whose preset asks for a stride that it has not."""
    before = (out / "cells" / "pixels" / "seed-0.json").stat().st_mtime_ns
    preset = replace(SMALL, teacher_stride=7)
    (out / "preset.json").write_text(json.dumps(preset.__dict__))
    failed = methods.run_cells(out, [("pixels", 0), ("teacher", 0), ("random", 1)], jobs=2, minutes=5)
    (out / "preset.json").write_text(json.dumps(SMALL.__dict__, indent=1) + "\n")
    printed = capsys.readouterr().out
    assert failed == [("teacher", 0)] and "FAILED (exit code 1)" in printed and "done" in printed
    assert "stride = 7" in (out / "logs" / "teacher-0.log").read_text()
    assert (out / "cells" / "random" / "seed-1.json").is_file()
    assert (out / "cells" / "pixels" / "seed-0.json").stat().st_mtime_ns == before
    assert methods.run_cells(out, [("random", 2)], jobs=1, minutes=-1) == []
    assert not (out / "cells" / "random" / "seed-2.json").exists()


@pytest.mark.parametrize("preset", rows.PRESETS.values(), ids=rows.PRESETS.keys())
@pytest.mark.parametrize("name", STUDENTS)
def test_every_row_of_every_preset_is_a_valid_run(name: str, preset: rows.Preset) -> None:
    row = rows.ROWS[name]
    run = load_recipe(row.recipe, rows.pretraining(row, name, preset, "none", 3))
    infos = describe(build_skeletons(run.teachers, run.data.image_size))
    kind = method_class(run.method.name)
    kind.check(run, infos)
    assert run.seed == 3 and run.schedule.steps == preset.steps and run.student.width == preset.width
    teacher = next(iter(run.teachers.values()), None)
    assert (teacher is not None) == ("align" in name or "mrmae" in name)
    assert teacher is None or teacher.random == name.endswith("_random")
    tuned = load_recipe("mae_tiny", rows.finetuning(row, preset, "none", 3, "runs/x", preset.finetune_steps))
    method_class("finetune").check(tuned, {})
    with torch.device("meta"):
        encoder = kind(run, infos).student.state_dict()
        classifier = method_class("finetune")(tuned, {}).student.state_dict()
    assert len(classifier.keys() & encoder.keys()) > 20


@pytest.mark.parametrize("preset", rows.PRESETS.values(), ids=rows.PRESETS.keys())
def test_probes_have_options_of_their_protocols(preset: rows.Preset) -> None:
    for metric, probe in probes(preset).items():
        kind = protocol_class(probe.protocol)
        kind.Config.model_validate(probe.options)
        assert (
            probe.metric == metric
            and metric in {*kind.metrics}
            and ("tokens" in kind.needs) == (probe.pool == "tokens")
        )


def test_bases_and_claims_name_rows() -> None:
    assert {base for row in rows.ROWS.values() for base in row.bases} <= rows.ROWS.keys()
    assert {name for c in rows.CLAIMS for name in (c.row, c.base)} <= rows.ROWS.keys()
    assert {c.metric for c in rows.CLAIMS} <= set(METRICS)


def test_interval_by_hand() -> None:
    """Student's t with 4 degrees of freedom at 95 %: 2.776."""
    values = [80.0, 82.0, 81.0, 79.0, 83.0]
    found = interval(values)
    half = 2.7764451 * math.sqrt(2.5) / math.sqrt(5)
    assert found.mean == 81.0 and found.seeds == 5 and abs(found.half - half) < 1e-6
    assert str(found) == "81.0 ± 2.0" and str(interval([3.0])) == "3.0 (1 seed)"


def test_differences_are_paired() -> None:
    """The seeds differ by 10 points, the gap hardly: 1, 1.2, 0.8; seed 3 has one of the two and does not count."""
    base = {seed: {"knn": value} for seed, value in enumerate((50.0, 60.0, 70.0))}
    ours = {seed: {"knn": value} for seed, value in enumerate((51.0, 61.2, 70.8, 99.0))}
    gap = difference({"a": ours, "b": base}, "a", "b", "knn")
    assert gap is not None and abs(gap.mean - 1.0) < 1e-9 and gap.seeds == 3
    assert abs(gap.half - 4.3026527 * 0.2 / math.sqrt(3)) < 1e-6
    assert difference({"a": ours}, "a", "b", "knn") is None


def test_verdicts() -> None:
    assert verdict(interval([1.0, 1.1, 0.9])) == "reached"
    assert verdict(interval([-1.0, -1.1, -0.9])) == "not reached: the other way round"
    assert verdict(interval([1.0, -1.1, 0.9])) == "not reached: the interval holds 0"
    assert verdict(interval([5.0])) == "one seed: no interval" and verdict(None) == "not measured"
    assert "| MAE | 0 |" in main_table({})


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from data_prep.fashion import read_fashion

    source = read_fashion(write_source(tmp_path / "in", 2), "train")
    assert len(balanced(source, 20).items) == 20
    with pytest.raises(UserError, match="class 0 of .* has 2 images and the preset takes 3 of each"):
        balanced(source, 30)
    for words, line in (
        (["--data", str(tmp_path / "no"), "--out", str(tmp_path / "a")], "apt-get install dataset-fashion-mnist"),
        (["--seeds", "0", "--out", str(tmp_path / "b")], "--seeds 0 must be at least 1"),
    ):
        assert main(["bench", "methods", "--preset", "tiny", *words]) == 2
        error = capsys.readouterr().err
        assert line in error and error.count("\n") == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "methods", "--preset", "gpu", "--out", str(tmp_path / "c")]) == 2
    assert "needs a GPU and torch sees none here" in capsys.readouterr().err
