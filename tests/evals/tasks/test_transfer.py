from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from data_prep import torchvision_sets
from data_prep.folder import read_folder
from data_prep.plan import ShardPlan
from data_prep.write_shards import unfinished, write
from mimscale.__main__ import main
from mimscale.config.recipes import validate
from mimscale.data.synthetic import make_image_folder
from mimscale.errors import UserError
from mimscale.evals.metrics import mean_per_class, top1
from mimscale.evals.tasks.transfer import Pair, pair_of, report_words
from tests.evals.conftest import initial, save_run, small_run

QUICK = ["--workers", "0", "--crop-pct", "1", "--device", "cpu"]


def transfer(*words: object) -> int:
    return main(["evaluate", "transfer", *map(str, words), *QUICK])


def shards(root: Path, name: str, split: str, seed: int, metric: str) -> None:
    """Classes of unequal size, so that the two metrics differ; the manifest names the metric as data_prep does."""
    images = make_image_folder(root / "images" / name / split, classes=3, per_class=20, side=32, seed=seed)
    for path in sorted((images / "class_000").iterdir())[4:]:
        path.unlink()
    source = read_folder(images, labelled=True)
    source.description["metric"] = metric
    plan = ShardPlan(source, seed=0)
    assert not write(plan, root / name / split, unfinished(plan, root / name / split))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    for name, metric in (("pets", torchvision_sets.PER_CLASS), ("cars", torchvision_sets.TOP1)):
        for split, seed in (("train", 0), ("val", 1)):
            shards(root, name, split, seed + 2 * (name == "cars"), metric)
    return root


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "a b"])
def test_the_name_of_a_set_is_no_path(name: str) -> None:
    with pytest.raises(UserError, match="the name of a data set is made of letters"):
        pair_of(f"{name}=train:val")


def test_mean_per_class_by_hand() -> None:
    """Right: 3 of 4, 0 of 1, 1 of 1; class 3 does not occur, though it is predicted once."""
    labels = torch.tensor([0, 0, 0, 0, 1, 2])
    predictions = torch.tensor([0, 0, 0, 1, 3, 2])
    assert mean_per_class(predictions, labels, 4) == pytest.approx(100 * (0.75 + 0 + 1) / 3, abs=1e-4)
    assert top1(predictions, labels, 4) == pytest.approx(100 * 4 / 6, abs=1e-4)


def test_one_table_of_several_sets_and_protocols(
    sets: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    words = ["--sets", f"pets={sets / 'pets'}", f"cars={sets / 'cars/train'}:{sets / 'cars/val'}"]
    assert transfer(run_dir, *words, "--baselines", "--out", out) == 0
    report = json.loads(out.read_text())
    networks = ["raw pixels", "random init", run_dir.name]
    assert [(r["protocol"], r["network"]) for r in report["rows"]] == [
        (p, n) for p in ("knn", "linear") for n in networks
    ]
    parts = {(part["set"], part["protocol"]["name"]): part["rows"] for part in report["parts"]}
    for row in report["rows"]:
        own = {name: _of(parts[name, row["protocol"]], row["network"]) for name in ("pets", "cars")}
        key = row["protocol"]
        assert row["values"] == {"pets": own["pets"][f"{key}_per_class"], "cars": own["cars"][key]}
        assert row["mean"] == pytest.approx(fmean(row["values"].values()))
    assert any(part[0]["knn"] != part[0]["knn_per_class"] for key, part in parts.items() if key[1] == "knn")
    assert report["sets"] == {"pets": torchvision_sets.PER_CLASS, "cars": torchvision_sets.TOP1}
    text = capsys.readouterr().out
    assert "pets *" in text and "cars" in text and "mean" in text and f"{report['rows'][0]['mean']:.1f}" in text


def _of(rows: list[dict[str, Any]], network: str) -> dict[str, Any]:
    (row,) = [row for row in rows if row["network"] == network]
    return row


def test_a_set_alone_gives_the_number_of_the_protocol_itself(sets: Path, run_dir: Path, tmp_path: Path) -> None:
    assert transfer(run_dir, "--sets", f"cars={sets / 'cars'}", "--protocols", "linear") == 0
    (table,) = (run_dir / "eval").glob("transfer-cars-linear-mean-*.json")
    words = ["--train", sets / "cars" / "train", "--val", sets / "cars" / "val", "--out", tmp_path / "one.json"]
    assert main(["evaluate", "linear", str(run_dir), *map(str, words), *QUICK]) == 0
    (one,), (row,) = json.loads((tmp_path / "one.json").read_text())["rows"], json.loads(table.read_text())["rows"]
    assert row["values"] == {"cars": one["linear"]} and row["mean"] == one["linear"]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_reference_run(sets: Path, tmp_path: Path, seed: int) -> None:
    """An untrained ViT on coloured shapes: means of 52.0 (51.4 to 52.5) and 64.6 (60.8 to 68.1); chance is below 40."""
    run = save_run(tmp_path / "run", small_run("mae"), step=seed)
    words = [run, "--sets", f"pets={sets / 'pets'}", f"cars={sets / 'cars'}", "--out", tmp_path / "a.json"]
    assert transfer(*words) == 0
    for row in json.loads((tmp_path / "a.json").read_text())["rows"]:
        figure, margin = {"knn": (52.0, 6), "linear": (64.6, 9)}[row["protocol"]]
        assert row["mean"] == pytest.approx(figure, abs=margin), row


def test_classifiers_that_were_trained_on_the_sets(sets: Path, run_dir: Path, tmp_path: Path) -> None:
    """The row of a method is what `evaluate top1` measures, where the metric is top-1."""
    head = {"head.weight": torch.randn(3, 32, generator=torch.Generator().manual_seed(3))}
    run = small_run("finetune")
    words = []
    for step, name in enumerate(("pets", "cars")):
        save_run(tmp_path / name, run, step=step, state=initial(run, step) | head)
        words.append(f"{name}={tmp_path / name}")
    method = {"name": "linear_probe", "classes": 3, "norm_batch": 4}
    probe = validate({**run.dump(), "method": method, "engine": {"ds_config": "zero0_fp32"}}, "test")
    words += [f"{name}={save_run(tmp_path / f'probe-{name}', probe)}" for name in ("pets", "cars")]
    of_sets = ["--sets", f"pets={sets / 'pets'}", f"cars={sets / 'cars'}", "--protocols", "knn"]
    assert transfer(run_dir, *of_sets, "--classifiers", *words, "--out", tmp_path / "a.json") == 0
    *_, row, linear = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert linear["protocol"] == "linear_probe" and set(linear["values"]) == {"pets", "cars"}
    assert row["protocol"] == "finetune" and row["mean"] == pytest.approx(fmean(row["values"].values()))
    one = ["top1", str(tmp_path / "cars"), "--val", str(sets / "cars" / "val"), "--out", str(tmp_path / "one.json")]
    assert main(["evaluate", *one, "--workers", "0", "--device", "cpu"]) == 0
    (top,) = json.loads((tmp_path / "one.json").read_text())["rows"]
    assert row["values"]["cars"] == top["top1"] and row["values"]["pets"] != row["values"]["cars"]


def test_a_report_with_classifiers_has_another_name() -> None:
    heads = [[], [("pets", Path("a"))], [("pets", Path("b"))]]
    names = {"-".join(report_words(["pets"], ["knn"], some)) for some in heads}
    assert len(names) == 3 and "transfer-pets-knn" in names and not any("/" in name for name in names)


def test_forms_of_a_set(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    assert pair_of(f"a={tmp_path}") == Pair("a", tmp_path / "train", tmp_path / "val")
    assert pair_of("a=x/train:x/test") == Pair("a", Path("x/train"), Path("x/test"))


def test_refusals(sets: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: object) -> str:
        assert transfer(run_dir, *words, "--out", tmp_path / "out.json") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and not (tmp_path / "out.json").exists()
        return error

    pets = f"pets={sets / 'pets'}"
    assert "--sets pets is not NAME=FOLDER or NAME=TRAIN:VAL" in refused("--sets", "pets")
    assert "is not NAME=FOLDER" in refused("--sets", "pets=a:b:c")
    assert "has no folder train" in refused("--sets", f"a={tmp_path}")
    assert "--sets pets: the name is given twice" in refused("--sets", pets, pets)
    assert "no such folder" in refused("--sets", pets, f"b={tmp_path / 'x'}:{tmp_path / 'y'}")
    assert "protocol = 'knm' is unknown; did you mean 'knn'?" in refused("--sets", pets, "--protocols", "knm")
    text = "--protocols retrieval reports percent mAP, and --sets pets asks for mean per-class accuracy"
    assert text in refused("--sets", pets, "--protocols", "knn", "retrieval")
    assert "is not NAME=RUN with a NAME of --sets (pets)" in refused("--sets", pets, "--classifiers", "cars=x")
    assert "holds no fine-tuned classifier" in refused("--sets", pets, "--classifiers", f"pets={run_dir}")
    ft = save_run(tmp_path / "ft", small_run("finetune"))
    twice = [f"pets={ft}", f"pets={ft}"]
    assert "--classifiers pets: two runs of finetune" in refused("--sets", pets, "--classifiers", *twice)
    cars = f"cars={sets / 'cars'}"
    assert "no run of finetune for cars" in refused("--sets", pets, cars, "--classifiers", f"pets={ft}")
    assert transfer(run_dir, "--sets", pets, "--out", tmp_path / "out.txt") == 2
    assert "must end in .json" in capsys.readouterr().err
