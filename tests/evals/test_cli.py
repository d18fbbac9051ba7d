from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mimscale.__main__ import main
from mimscale.data.manifest import Manifest
from mimscale.data.synthetic import make_image_folder
from mimscale.evals import logistic_regression
from mimscale.evals.runner import protocol_class, protocol_names
from tests.evals.conftest import initial, save_run, shards, small_run

QUICK = ["--workers", "0", "--crop-pct", "1", "--device", "cpu", "--no-cache"]


def evaluate(*words: object) -> int:
    return main(["evaluate", *map(str, words), *QUICK])


def rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"]


def test_knn_has_raw_pixels_and_the_random_network_beside_the_run(
    data: tuple[Path, Path], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["knn", run_dir, "--train", data[0], "--val", data[1], "--pool", "mean", "cls", "--baselines"]
    assert evaluate(*words) == 0
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
    assert report["protocol"]["k"] == 20 and report["versions"]["torch"] and report["protocol"]["ema"] is False
    assert report["metrics"] == {"knn": "kNN (k = 20)"} and report["unit"] == "percent top-1"
    text = capsys.readouterr().out
    assert "kNN (k = 20)" in text
    assert "raw pixels" in text and "random init" in text and f"{report['rows'][3]['knn']:.1f}" in text


def test_linear_and_few_shot_of_several_runs_at_once(data: tuple[Path, Path], run_dir: Path, tmp_path: Path) -> None:
    other = save_run(tmp_path / "supervised", small_run("finetune"))
    larger = save_run(tmp_path / "larger", small_run("mae", image_size=48))
    words = [run_dir, other, larger, "--train", data[0], "--val", data[1], "--baselines"]
    names = [
        "raw pixels at 32", "raw pixels at 48", "random init ViT 32x2/8 at 32", "random init ViT 32x2/8 at 48",
        "mae", "supervised", "larger",
    ]  # fmt: skip
    assert evaluate("linear", *words, "--out", tmp_path / "linear.json") == 0
    assert [r["network"] for r in rows(tmp_path / "linear.json")] == names
    assert all(row["l2"] > 0 and row["iterations"] > 0 for row in rows(tmp_path / "linear.json"))
    assert rows(tmp_path / "linear.json")[0]["linear"] > 50  # the class decides shape and hue: pixels are no chance
    assert evaluate("fewshot", *words, "--shots", 1, "--draws", 2, "--out", tmp_path / "fewshot.json") == 0
    assert [r["network"] for r in rows(tmp_path / "fewshot.json")] == names


def test_few_shot_draws_come_from_the_seed(data: tuple[Path, Path], run_dir: Path, tmp_path: Path) -> None:
    words = ["fewshot", run_dir, "--train", data[0], "--val", data[1], "--shots", 2, "--draws", 3]
    assert evaluate(*words, "--out", tmp_path / "a.json") == 0
    for row in rows(tmp_path / "a.json"):
        assert len(row["few_shot_draws"]) == 3
        assert row["few_shot"] == pytest.approx(sum(row["few_shot_draws"]) / 3)
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

    images = make_image_folder(tmp_path / "images", classes=4, per_class=3, side=32)
    four = shards(images, tmp_path / "four")
    unlabelled = shards(images, tmp_path / "unlabelled", labelled=False)
    assert "different classes: 'class_003'" in refused("knn", run_dir, val=four)
    assert "without labels" in refused("knn", run_dir, train=unlabelled)
    assert "without labels" in refused("linear", run_dir, val=unlabelled)
    assert "training set itself" in refused("knn", run_dir, val=train)
    assert "--k 200 is more than the 120" in refused("knn", run_dir, "--k", 200)
    assert "--temperature 0: input should be greater than 0" in refused("knn", run_dir, "--temperature", 0)
    assert "--k many: input should be a valid integer" in refused("knn", run_dir, "--k", "many")
    assert "--shots 41: class 0 has 40" in refused("fewshot", run_dir, "--shots", 41)
    assert "has no moving average" in refused("knn", run_dir, "--ema")
    assert "image size 33 is not a multiple" in refused("knn", run_dir, "--image-size", 33)
    assert "neither a run folder" in refused("knn", tmp_path / "nothing")
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    assert "no complete checkpoint yet" in refused("knn", fresh)


def test_other_settings_get_another_file(data: tuple[Path, Path], run_dir: Path) -> None:
    assert evaluate("fewshot", run_dir, "--train", data[0], "--val", data[1], "--shots", 1, "--draws", 2) == 0
    assert (run_dir / "eval" / "fewshot-shots1-draws2-mean-step-00000007.json").is_file()


def test_warnings_of_a_protocol_are_printed_and_kept(
    data: tuple[Path, Path],
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logistic_regression, "MAX_ITERATIONS", 2)
    assert evaluate("linear", run_dir, "--train", data[0], "--val", data[1], "--out", tmp_path / "a.json") == 0
    lines = capsys.readouterr().err.splitlines()
    told = "L-BFGS stopped after 2 iterations without having converged"
    assert f"mimscale evaluate: warning: mae, mean: {told}" in lines
    assert all(told in row["warnings"] and row["converged"] is False for row in rows(tmp_path / "a.json"))


def test_the_moving_average_is_another_student(data: tuple[Path, Path], tmp_path: Path) -> None:
    """Its row equals that of a run whose trained weights are the average."""
    run = small_run("mae")
    average = initial(run, seed=8)
    both = save_run(tmp_path / "both", run, ema={n: t for n, t in average.items() if not n.endswith("pos_embed")})
    alone = save_run(tmp_path / "alone", run, step=8)
    words = ["--train", data[0], "--val", data[1]]
    assert evaluate("linear", both, *words, "--ema") == 0
    assert evaluate("linear", both, *words) == 0
    assert evaluate("linear", alone, *words) == 0
    averaged = json.loads((both / "eval" / "linear-mean-ema-step-00000007.json").read_text())
    row, trained = averaged["rows"][-1], rows(both / "eval" / "linear-mean-step-00000007.json")[-1]
    expected = rows(alone / "eval" / "linear-mean-step-00000008.json")[-1]
    metrics = ("linear", "l2", "iterations", "hold_out_accuracy", "search_iterations")
    assert averaged["protocol"]["ema"] is True and row["network"] == "both (ema)" and trained["network"] == "both"
    assert [row[m] for m in metrics] == [expected[m] for m in metrics] != [trained[m] for m in metrics]


def test_help_fits_a_screen_and_has_a_line_for_each_protocol(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for words in (["--help"], *([name, "--help"] for name in protocol_names())):
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", *words])
        assert stop.value.code == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 40 and all(len(line) <= 80 for line in lines)
        if words == ["--help"]:
            for name in protocol_names():
                (line,) = [line for line in lines if line.split()[:1] == [name]]
                assert str(protocol_class(name).__doc__).splitlines()[0] in line
            assert lines[-1].startswith("  mimscale evaluate knn ")
