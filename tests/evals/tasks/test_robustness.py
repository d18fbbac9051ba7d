from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from mimscale.__main__ import main
from mimscale.config.run import method_class
from mimscale.data.loader import eval_batches
from mimscale.data.manifest import Manifest
from mimscale.data.synthetic import make_image_folder
from mimscale.evals.robustness.corruptions import ALEXNET, SEVERITIES
from tests.evals.conftest import initial, save_run, shards, small_run

QUICK = ["--workers", "0", "--crop-pct", "1", "--device", "cpu"]
WNIDS = ["n01440764", "n01443537", "n01484850"]


def robustness(*words: object) -> int:
    return main(["evaluate", "robustness", *map(str, words), *QUICK])


def row_of(path: Path) -> dict[str, Any]:
    (row,) = json.loads(path.read_text())["rows"]
    return row


def named(images: Path, names: list[str]) -> Path:
    """The class folders under these names, in their order; those behind the last name are removed."""
    folders = sorted(images.iterdir())
    for folder, name in zip(folders, names, strict=False):
        folder.rename(images / name)
    for folder in folders[len(names) :]:
        shutil.rmtree(folder)
    return images


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train and val of three wnids; a: two of them; v2: all, as folders 0 to 2; c: 75 corrupted sets; real.json."""
    root = tmp_path_factory.mktemp("world")
    for name, seed, names in (
        ("train", 0, WNIDS),
        ("val", 1, WNIDS),
        ("a", 2, [WNIDS[2], WNIDS[0]]),
        ("v2", 3, ["0", "1", "2"]),
        ("cats", 4, ["cat", WNIDS[0]]),
    ):
        made = make_image_folder(root / "images" / name, classes=3, per_class=6, side=32, seed=seed)
        if name == "val":
            for number, file in enumerate(sorted(made.glob("*/*")), 1):
                file.rename(file.with_name(f"ILSVRC2012_val_{number:08d}.JPEG"))
        shards(named(made, names), root / name)
    for severity in SEVERITIES:
        for kind in ("light", "heavy"):
            made = root / "images" / f"{kind}{severity}"
            for file in sorted((root / "images" / "val").glob("*/*")):
                target = made / file.parent.name / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                blurred = Image.open(file).filter(ImageFilter.GaussianBlur(severity * (3 if kind == "heavy" else 1)))
                blurred.convert("L").convert("RGB").save(target, "JPEG")
            shards(made, root / f"{kind}{severity}")
        for name in ALEXNET:
            kind = "heavy" if name == "fog" else "light"
            shutil.copytree(root / f"{kind}{severity}", root / "c" / name / str(severity))
    (root / "real.json").write_text(json.dumps([[n % 3, 2] if n % 5 else [] for n in range(18)]))
    return root


def head(names: list[str]) -> dict[str, torch.Tensor]:
    """A random head: that of an initialised run gives nearly equal logits."""
    generator = torch.Generator().manual_seed(5)
    return {"head.weight": torch.randn(len(names), 32, generator=generator)}


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory, world: Path) -> Path:
    run = small_run("finetune")
    run = run.model_copy(update={"data": run.data.model_copy(update={"shards": str(world / "train")})})
    return save_run(tmp_path_factory.mktemp("runs") / "ft", run, state=initial(run, 7) | head(WNIDS))


def logits_by_hand(shards_of: Path) -> tuple[torch.Tensor, torch.Tensor, Manifest]:
    """Of the fine-tuned classifier on all images of a set, in one batch."""
    run, manifest = small_run("finetune"), Manifest.load(shards_of)
    method = method_class("finetune")(run, {}).eval()
    method.load_state_dict(initial(run, 7) | head(WNIDS))
    (batch,) = eval_batches(manifest, 32, batch=manifest.samples, workers=0, crop_pct=1.0)
    with torch.no_grad():
        logits = method.logits(batch.normalised().images)
    return logits, torch.from_numpy(np.array(manifest.labels)), manifest


def test_a_finetuned_run_on_subsets_numbers_and_several_labels(world: Path, finetuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = ["--sets", f"a={world / 'a'}", f"v2={world / 'v2'}", "--val", world / "val", "--real", world / "real.json"]
    assert robustness(finetuned, *words, "--out", out) == 0
    row = row_of(out)
    logits, labels, manifest = logits_by_hand(world / "val")
    assert row["val"] == pytest.approx(100 * float((logits.argmax(1) == labels).double().mean()), abs=1e-3)
    real = json.loads((world / "real.json").read_text())
    of_sample = [real[int(manifest.key(sample)[-8:]) - 1] for sample in range(manifest.samples)]
    hits = [int(p) in row_ for p, row_ in zip(logits.argmax(1), of_sample, strict=True) if row_]
    assert row["ReaL"] == pytest.approx(100 * np.mean(hits), abs=1e-3) and row["real_images"] == len(hits) == 14
    logits, labels, manifest = logits_by_hand(world / "a")
    assert manifest.classes == [WNIDS[0], WNIDS[2]]
    own = logits[:, [0, 2]].argmax(1)
    assert row["a"] == pytest.approx(100 * float((own == labels).double().mean()), abs=1e-3)
    assert not torch.equal(torch.tensor([0, 2])[own], logits.argmax(1))  # the class that the set lacks would win some
    logits, labels, _ = logits_by_hand(world / "v2")
    assert row["v2"] == pytest.approx(100 * float((logits.argmax(1) == labels).double().mean()), abs=1e-3)
    assert row["classes_matched"] == {"val": "by name", "a": "by name", "v2": "by index"}


def test_corruptions_by_hand(world: Path, finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """14 corruptions have the same images, fog has others: mCE from 10 error rates and AlexNet's."""
    out = tmp_path / "out.json"
    assert robustness(finetuned, "--corruptions", world / "c", "--out", out) == 0
    row = row_of(out)
    errors = {}
    for kind in ("light", "heavy"):
        for severity in SEVERITIES:
            logits, labels, _ = logits_by_hand(world / f"{kind}{severity}")
            errors[kind, severity] = float((logits.argmax(1) != labels).double().mean())
    sums = {kind: sum(errors[kind, s] for s in SEVERITIES) for kind in ("light", "heavy")}
    assert sums["light"] > 0 and sums["light"] != sums["heavy"]
    ce = {name: 100 * sums["heavy" if name == "fog" else "light"] / (5 * alexnet) for name, alexnet in ALEXNET.items()}
    assert row["corruption_error"] == pytest.approx(ce, abs=1e-2)
    assert row["mCE"] == pytest.approx(sum(ce.values()) / 15, abs=1e-2)
    printed = capsys.readouterr().out
    assert f"{row['mCE']:.1f}" in printed and "less is better" in printed


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_reference_run_of_a_linear_head(world: Path, tmp_path: Path, seed: int) -> None:
    run = save_run(tmp_path / "run", small_run("mae"), step=seed)
    words = [run, "--train", world / "train", "--val", world / "val", "--sets", f"a={world / 'a'}"]
    assert robustness(*words, "--baselines", "--out", tmp_path / "out.json") == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["network"] for row in rows] == ["raw pixels, pixels", "random init, mean", "run, mean"]
    assert rows[-1]["val"] == pytest.approx(68.5, abs=15)  # 61.1, 72.2 and 72.2; chance is 33.3


def test_the_linear_head_is_that_of_the_protocol(world: Path, run_dir: Path, tmp_path: Path) -> None:
    words = ["--train", world / "train", "--val", world / "val"]
    assert robustness(run_dir, *words, "--pool", "mean", "cls", "--out", tmp_path / "a.json") == 0
    assert main(["evaluate", "linear", str(run_dir), *map(str, words), "--pool", "mean", "cls", "--out",
                 str(tmp_path / "b.json"), *QUICK]) == 0  # fmt: skip
    ours, theirs = (json.loads((tmp_path / name).read_text())["rows"] for name in ("a.json", "b.json"))
    assert [row["val"] for row in ours] == [row["linear"] for row in theirs]
    assert [row["l2"] for row in ours] == [row["l2"] for row in theirs]


def test_reports_of_other_labels_have_other_names(
    world: Path, finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finetuned, tmp_path / "run")
    (tmp_path / "real.json").write_text(json.dumps([[1]] * 18))
    changes: list[list[object]] = [[], ["--real", world / "real.json"], ["--real", tmp_path / "real.json"]]
    for number, words in enumerate([*changes, ["--classes-of", world / "train"]], 1):
        assert robustness(run, "--val", world / "val", *words) == 0
        assert len(list((run / "eval").glob("*.json"))) == number
    assert "AlexNet" not in capsys.readouterr().out


def test_predictions_are_kept_and_belong_to_their_classes(
    world: Path, finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [finetuned, "--sets", f"v2={world / 'v2'}", "--cache", tmp_path / "cache", "--out", tmp_path / "out.json"]
    assert robustness(*words) == 0
    assert "features of v2" in capsys.readouterr().err
    before = row_of(tmp_path / "out.json")
    assert robustness(*words) == 0
    assert "features of v2" not in capsys.readouterr().err and row_of(tmp_path / "out.json") == before


def test_refusals(
    world: Path, finetuned: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(run: Path, *words: object) -> str:
        assert robustness(run, *words, "--no-cache", "--out", tmp_path / "out.json") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and not (tmp_path / "out.json").exists(), error
        return error

    a = f"a={world / 'a'}"
    assert "1 of 2 classes are not among the 3" in refused(finetuned, "--sets", f"x={world / 'cats'}")
    assert "1 of 2 classes are not among the 3" in refused(
        run_dir, "--sets", f"x={world / 'cats'}", "--train", world / "train"
    )
    assert "holds no fine-tuned classifier" in refused(run_dir, "--sets", a)
    assert "--real" in refused(finetuned, "--real", world / "real.json")
    assert "nothing to measure" in refused(finetuned)
    (tmp_path / "short.json").write_text("[[0]]")
    assert "has labels of 1 images" in refused(finetuned, "--val", world / "val", "--real", tmp_path / "short.json")
    shutil.copytree(world / "c", tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "snow" / "4")
    assert "1 of 75 data sets" in refused(finetuned, "--corruptions", tmp_path / "c")
    assert "has 2 classes, the classifier 3 outputs" in refused(finetuned, "--sets", a, "--classes-of", world / "a")
    assert "is not NAME=SHARDS" in refused(finetuned, "--sets", f"mCE={world / 'a'}")
    assert "--baselines are measured with a linear head" in refused(finetuned, "--sets", a, "--baselines")
    assert "--image-size 33 is not a multiple" in refused(finetuned, "--sets", a, "--image-size", 33)
    assert "is the training set itself" in refused(finetuned, "--val", world / "train")
    assert "is the training set itself" in refused(run_dir, "--val", world / "train", "--train", world / "train")
    moved = save_run(tmp_path / "moved", small_run("finetune"))
    assert "name it with --classes-of SHARDS" in refused(moved, "--sets", a)
