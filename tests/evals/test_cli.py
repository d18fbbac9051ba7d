from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mimscale.__main__ import main
from mimscale.data.manifest import Manifest
from mimscale.data.synthetic import make_image_folder
from tests.evals.conftest import save_run, shards, small_run

QUICK = ["--workers", "0", "--crop-pct", "1", "--device", "cpu"]


def evaluate(*words: object) -> int:
    return main(["evaluate", *map(str, words), *QUICK])


def rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"]


def test_knn_has_raw_pixels_and_the_random_network_beside_the_run(
    data: tuple[Path, Path], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("knn", run_dir, "--train", data[0], "--val", data[1], "--pool", "mean", "cls") == 0
    path = run_dir / "eval" / "knn-mean-cls-step-00000007.json"
    report = json.loads(path.read_text())
    assert [(r["network"], r["pool"]) for r in report["rows"]] == [
        ("raw pixels", "pixels"), ("random init", "mean"), ("random init", "cls"), ("mae", "mean"), ("mae", "cls")
    ]  # fmt: skip
    assert all(0 <= r["knn"] <= 100 for r in report["rows"])
    assert report["rows"][3]["step"] == 7 and len(report["rows"][3]["sha256"]) == 64
    assert report["train"] == {
        "shards": str(data[0]),
        "samples": 120,
        "fingerprint": Manifest.load(data[0]).fingerprint,
    }
    assert report["protocol"]["k"] == 20 and report["versions"]["torch"]
    text = capsys.readouterr().out
    assert "raw pixels" in text and "random init" in text and f"{report['rows'][3]['knn']:.1f}" in text


def test_linear_with_few_shots_of_several_runs_at_once(data: tuple[Path, Path], run_dir: Path, tmp_path: Path) -> None:
    other = save_run(tmp_path / "supervised", small_run("finetune"))
    larger = save_run(tmp_path / "larger", small_run("mae", image_size=48))
    words = ["linear", run_dir, other, larger, "--train", data[0], "--val", data[1], "--shots", 2, "--draws", 3]
    assert evaluate(*words, "--out", tmp_path / "a.json") == 0
    assert [r["network"] for r in rows(tmp_path / "a.json")] == [
        "raw pixels at 32", "raw pixels at 48", "random init ViT 32x2/8 at 32", "random init ViT 32x2/8 at 48",
        "mae", "supervised", "larger",
    ]  # fmt: skip
    for row in rows(tmp_path / "a.json"):
        assert len(row["few_shot_draws"]) == 3 and row["l2"] > 0
        assert row["few_shot"] == pytest.approx(sum(row["few_shot_draws"]) / 3)
    assert rows(tmp_path / "a.json")[0]["linear"] > 50  # the class decides shape and hue: raw pixels are no chance
    assert evaluate(*words, "--out", tmp_path / "b.json") == 0
    assert rows(tmp_path / "a.json") == rows(tmp_path / "b.json")
    assert evaluate(*words, "--seed", 1, "--out", tmp_path / "c.json") == 0
    assert rows(tmp_path / "a.json")[0]["few_shot_draws"] != rows(tmp_path / "c.json")[0]["few_shot_draws"]


def test_batch_size_does_not_change_the_result(data: tuple[Path, Path], run_dir: Path, tmp_path: Path) -> None:
    for batch in (17, 120):
        out = ["--batch", batch, "--out", tmp_path / f"{batch}.json"]
        assert evaluate("knn", run_dir, "--train", data[0], "--val", data[1], *out) == 0
    assert rows(tmp_path / "17.json") == rows(tmp_path / "120.json")


def test_refusals(data: tuple[Path, Path], run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = data

    def refused(*words: object, train: Path = train, val: Path = val) -> str:
        assert evaluate(*words, "--train", train, "--val", val, "--out", tmp_path / "out.json") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and not (tmp_path / "out.json").exists()
        return error

    pictures = make_image_folder(tmp_path / "pictures", classes=4, per_class=3, side=32)
    four = shards(pictures, tmp_path / "four")
    unlabelled = shards(pictures, tmp_path / "unlabelled", labelled=False)
    assert "different classes: 'class_003'" in refused("knn", run_dir, val=four)
    assert "without labels" in refused("knn", run_dir, train=unlabelled)
    assert "without labels" in refused("linear", run_dir, val=unlabelled)
    assert "training set itself" in refused("knn", run_dir, val=train)
    assert "--k 200 is more than the 120" in refused("knn", run_dir, "--k", 200)
    assert "--temperature 0 must be above 0" in refused("knn", run_dir, "--temperature", 0)
    assert "--shots 41: class 0 has 40" in refused("linear", run_dir, "--shots", 41)
    assert "image size 33 is not a multiple" in refused("knn", run_dir, "--image-size", 33)
    assert "neither a run folder" in refused("knn", tmp_path / "nothing")
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    assert "no complete checkpoint yet" in refused("knn", fresh)
