from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_prep.folder import read_folder
from data_prep.plan import ShardPlan
from data_prep.write_shards import unfinished, write
from mimscale.__main__ import main
from mimscale.data.manifest import Manifest
from mimscale.data.synthetic import make_image_folder
from mimscale.evals import logistic_regression
from mimscale.evals.runner import protocol_class, protocol_names
from tests.evals.conftest import initial, save_run, shards, small_run

QUICK = ["--workers", "0", "--crop-pct", "1", "--device", "cpu", "--no-cache"]


def evaluate(*words: object) -> int:
    return main(["evaluate", *map(str, words), *QUICK])


def report_of(run_dir: Path, start: str) -> Path:
    """The one report of a run whose name starts so."""
    (path,) = (run_dir / "eval").glob(f"{start}-*.json")
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"]


def without_names(shards: Path, copy: Path) -> Path:
    """The data set as `data_prep index` makes it of samples with numbers of classes."""
    shutil.copytree(shards, copy)
    manifest = copy / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "classes": None}))
    return copy


def test_knn_has_raw_pixels_and_the_random_network_beside_the_run(
    data: tuple[Path, Path], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["knn", run_dir, "--train", data[0], "--val", data[1], "--pool", "mean", "cls", "--baselines"]
    assert evaluate(*words) == 0
    path = report_of(run_dir, "knn-mean-cls")
    assert path.name.startswith("knn-mean-cls-crop1-baselines-fp32-") and path.name.endswith("-step-00000007.json")
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
    assert report["rows"][0]["k"] == 20 and report["versions"]["scipy"] and report["protocol"]["ema"] is False
    assert report["metrics"] == {
        "knn": "kNN (k = 20)",
        "knn_k10": "k = 10",
        "knn_k100": "k = 100",
        "knn_k200": "k = 200",
    }
    assert report["unit"] == "percent top-1" and report["protocol"]["image_size"] == [32] and report["ranks"] == 1
    assert report["seconds"]["total"] >= 0 and report["commit"] and "knn_k200" not in report["rows"][0]
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
    assert evaluate("lowshot", *words, "--shots", 1, "--draws", 2, "--out", tmp_path / "lowshot.json") == 0
    assert [r["network"] for r in rows(tmp_path / "lowshot.json")] == names


def test_lowshot_draws_come_from_the_seed(data: tuple[Path, Path], run_dir: Path, tmp_path: Path) -> None:
    words = ["lowshot", run_dir, "--train", data[0], "--val", data[1], "--shots", 2, "--draws", 3]
    assert evaluate(*words, "--out", tmp_path / "a.json") == 0
    for row in rows(tmp_path / "a.json"):
        assert len(row["lowshot_draws"]) == 3
        assert row["lowshot"] == pytest.approx(sum(row["lowshot_draws"]) / 3)
    assert evaluate(*words, "--out", tmp_path / "b.json") == 0
    assert rows(tmp_path / "a.json") == rows(tmp_path / "b.json")
    assert evaluate(*words, "--seed", 1, "--out", tmp_path / "c.json") == 0
    assert rows(tmp_path / "a.json")[0]["lowshot_draws"] != rows(tmp_path / "c.json")[0]["lowshot_draws"]


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
    nameless = [without_names(path, tmp_path / f"nameless {path.name}") for path in (train, four)]
    assert "different classes: no 3 in --train" in refused("knn", run_dir, train=nameless[0], val=nameless[1])
    one, other = (
        shards(
            make_image_folder(tmp_path / f"one {seed}", classes=1, per_class=3, side=32, seed=seed),
            tmp_path / f"{seed}",
        )
        for seed in (3, 4)
    )
    for name in protocol_names():
        assert "has images of one class only" in refused(name, run_dir, train=one, val=other)
    assert "without labels" in refused("knn", run_dir, train=unlabelled)
    assert "without labels" in refused("linear", run_dir, val=unlabelled)
    assert "training set itself" in refused("knn", run_dir, val=train)
    assert "--k 200 is more than the 120" in refused("knn", run_dir, "--k", 200)
    assert "--temperature 0: input should be greater than 0" in refused("knn", run_dir, "--temperature", 0)
    assert "--k many: input should be a valid integer" in refused("knn", run_dir, "--k", "many")
    assert "--shots 41: class 0 has 40" in refused("lowshot", run_dir, "--shots", 41)
    assert "--steps 10 stands in place of --epochs 5" in refused("sweep", run_dir, "--steps", 10, "--epochs", 5)
    assert "--rates 0: input should be greater than 0" in refused("sweep", run_dir, "--rates", 0)
    assert "--global-batch 1: input should be greater" in refused("attentive", run_dir, "--global-batch", 1)
    assert "--queries 7 does not divide" in refused("attentive", run_dir, "--queries", 7)
    assert "has no moving average" in refused("knn", run_dir, "--ema")
    assert "image size 33 is not a multiple" in refused("knn", run_dir, "--image-size", 33)
    assert "neither a run folder" in refused("knn", tmp_path / "nothing")
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    assert "no complete checkpoint yet" in refused("knn", fresh)


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("--crop-pct", "0", "above 0 and at most 1"),
        ("--crop-pct", "nan", "above 0 and at most 1"),
        ("--image-size", "80000", "8192 at most"),
        ("--workers", "100000", "1024 at most"),
        ("--seed", "-1", "0 or more"),
        ("--seed", "9" * 20, "0 or more"),
    ],
)
def test_options_out_of_bounds(option: str, value: str, rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "knn", "run", "--train", "a", "--val", "b", f"{option}={value}"])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2 and option in last and f"'{value}' must be" in last and rule in last


def test_other_settings_get_another_file(data: tuple[Path, Path], tmp_path: Path) -> None:
    run_dir = save_run(tmp_path / "mae", small_run("mae"))
    sets = ["--train", data[0], "--val", data[1]]
    for more in (
        [],
        ["--crop-pct", "0.9"],
        ["--precision", "bf16"],
        ["--seed", "1"],
        ["--image-size", "48"],
        ["--baselines"],
        ["--pool", "cls"],
        ["--k", "3", "7"],
        ["--train", data[1], "--val", data[0]],
    ):
        before = set((run_dir / "eval").glob("*.json"))
        assert main(["evaluate", "knn", *map(str, [run_dir, *sets, "--workers", "0", "--no-cache", *more])]) == 0
        assert len(set((run_dir / "eval").glob("*.json")) - before) == 1
    assert report_of(run_dir, "knn-k3+7-mean")


def test_the_report_goes_to_the_terminal_as_json(
    data: tuple[Path, Path], run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["lowshot", run_dir, "--train", data[0], "--val", data[1], "--shots", 1, "--draws", 2]
    assert evaluate(*words, "--out", tmp_path / "a.json") == 0
    assert "1 labels per class" in (text := capsys.readouterr().out) and "differs from papers: MSN's low-shot" in text
    assert evaluate(*words, "--out", tmp_path / "a.json", "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "a.json").read_text())


def test_validation_images_out_of_the_training_set(
    data: tuple[Path, Path], run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same folder elsewhere, the same shards in another set, the same images in other shards, some of them."""
    train, val = data
    shutil.copytree(train, tmp_path / "copy")
    images = tmp_path / "train-images"
    make_image_folder(images, classes=3, per_class=40, side=32, seed=0)  # as the fixture does
    plan = ShardPlan(read_folder(images, labelled=True), seed=1, shard_mb=256, shard_samples=30)
    assert not write(plan, tmp_path / "shuffled", unfinished(plan, tmp_path / "shuffled"))
    make_image_folder(tmp_path / "mixed-images", classes=3, per_class=15, side=32, seed=1)
    for path in sorted(images.rglob("*.*"))[:5]:
        shutil.copy(path, tmp_path / "mixed-images" / path.parent.name / f"other-{path.name}")
    mixed = shards(tmp_path / "mixed-images", tmp_path / "mixed")
    words = ["knn", run_dir, "--train", train, "--out", tmp_path / "a.json"]
    for other, text in (("copy", "is the training set itself"), ("shuffled", "were compared are there to the byte")):
        assert evaluate(*words, "--val", tmp_path / other) == 2
        assert text in capsys.readouterr().err
    assert evaluate(*words, "--val", mixed) == 0
    assert "images of --val" in (text := capsys.readouterr().err) and "too, so the figures are too high" in text
    assert evaluate(*words, "--val", val) == 0 and "too high" not in capsys.readouterr().err


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
    averaged = json.loads(report_of(both, "linear-mean-ema").read_text())
    row, trained = averaged["rows"][-1], rows(report_of(both, "linear-mean-crop1-fp32"))[-1]
    expected = rows(report_of(alone, "linear-mean"))[-1]
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
        assert len(lines) <= 48 and all(len(line) <= 80 for line in lines)
        if words == ["--help"]:
            whole = "".join(" ".join(lines).split())  # a long line goes on in the next
            for name in protocol_names():
                assert "".join((name + str(protocol_class(name).__doc__).splitlines()[0]).split()) in whole
            assert lines[-1].startswith("  mimscale evaluate knn ")
