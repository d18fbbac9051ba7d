"""The accuracy of fine-tuned classifiers: equal to a count by hand, for runs, averages and official files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mimscale.__main__ import main
from mimscale.convert.formats import finetune as official_names
from mimscale.data.loader import eval_batches
from mimscale.data.manifest import Manifest
from mimscale.data.synthetic import make_image_folder
from mimscale.distributed.coordination import Coordinator
from mimscale.errors import UserError
from mimscale.evals.classifier import load_classifier
from mimscale.evals.top1 import accuracy, count, labelled
from mimscale.evals.top1_cli import measure
from mimscale.methods.finetune import Finetune
from mimscale.types import normalised
from tests import golden
from tests.evals.conftest import initial, save_run, shards, small_run

CPU, ALONE = torch.device("cpu"), Coordinator(None)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = small_run("finetune")
    section = run.method.model_copy(update={"head_std": 1.0})
    run = run.model_copy(update={"method": section})
    average = {name: tensor + 0.5 for name, tensor in initial(run, 3).items()}
    return save_run(tmp_path_factory.mktemp("runs") / "ft", run, ema=average)


def by_hand(weights: dict[str, torch.Tensor], val: Path, crop_pct: float, image_size: int = 32) -> float:
    """Percent right of a method with these weights, from images as the loader gives them."""
    run = small_run("finetune", image_size)
    method = Finetune(run, {})
    method.load_state_dict(weights)
    right = total = 0
    for batch in eval_batches(Manifest.load(val), image_size, batch=7, workers=0, crop_pct=crop_pct):
        assert batch.labels is not None and batch.weights is not None
        for image, label, weight in zip(batch.images, batch.labels, batch.weights, strict=True):
            if weight:
                with torch.no_grad():
                    right += int(method.logits(normalised(image[None])).argmax() == label)
                total += 1
    return 100 * right / total


def options(**changes) -> dict:
    return {"device": CPU, "precision": "fp32", "workers": 0, "batch": 16, **changes}


def test_a_run_is_counted_right(run_dir: Path, data: tuple[Path, Path]) -> None:
    run = small_run("finetune")
    run = run.model_copy(update={"method": run.method.model_copy(update={"head_std": 1.0})})
    (row,) = measure([run_dir], data[1], ALONE, **options())["rows"]
    assert row["top1"] == pytest.approx(by_hand(initial(run, 7), data[1], 0.875), abs=1e-3)
    assert (row["top5"], row["samples"], row["step"], row["crop_pct"]) == (100, 45, 7, 0.875)
    (averaged,) = measure([run_dir], data[1], ALONE, **options(ema=True))["rows"]
    expected = {name: tensor + 0.5 for name, tensor in initial(run, 3).items()}
    assert averaged["top1"] == pytest.approx(by_hand(expected, data[1], 0.875), abs=1e-3)
    (tight,) = measure([run_dir], data[1], ALONE, **options(crop_pct=0.5))["rows"]
    assert tight["top1"] == pytest.approx(by_hand(initial(run, 7), data[1], 0.5), abs=1e-3)


def test_ranks_add_up(run_dir: Path, data: tuple[Path, Path]) -> None:
    found, val = load_classifier(run_dir, image_size=None, device=CPU, precision="fp32"), Manifest.load(data[1])

    def counted(rank: int, world: int) -> torch.Tensor:
        batches = eval_batches(val, 32, batch=8, workers=0, rank=rank, world=world)
        return count(found.logits, labelled(batches), CPU)

    whole = counted(0, 1)
    for world in (2, 4):
        assert torch.equal(torch.stack([counted(rank, world) for rank in range(world)]).sum(0), whole)
    assert accuracy(whole).samples == 45


def test_an_official_file(data: tuple[Path, Path], tmp_path: Path) -> None:
    """Sizes come from the tensors; at another image size the position table is resized."""
    g = golden.load("mae_finetune_train_dev")
    state = g.part("state_end")
    state = {name: tensor for name, tensor in state.items() if name not in ("head.weight", "head.bias")}
    state |= {"head.weight": g["state_end/head.weight"][:3].clone(), "head.bias": g["state_end/head.bias"][:3].clone()}
    # a width of 32 does not show the number of heads, 192 does
    with pytest.raises(UserError, match="give the heads"):
        save_file(state, tmp_path / "odd.safetensors")
        load_classifier(tmp_path / "odd.safetensors", image_size=None, device=CPU, precision="fp32")
    run = small_run("finetune").model_copy(
        update={"student": small_run("finetune").student.model_copy(update={"width": 192, "depth": 12, "heads": 3})}
    )
    method = Finetune(run, {})
    save_file(official_names.to_official(method.state_dict()).weights, tmp_path / "tiny.safetensors")
    found = load_classifier(tmp_path / "tiny.safetensors", image_size=48, device=CPU, precision="fp32")
    assert (found.classes, found.run.data.image_size, found.run.student.heads) == (3, 48, 3)
    (row,) = measure([tmp_path / "tiny.safetensors"], data[1], ALONE, **options(image_size=48, batch=45))["rows"]
    assert row["step"] is None and row["image_size"] == 48


def test_the_command(run_dir: Path, data: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "top1", str(run_dir), "--val", str(data[1]), "--workers", "0", "--device", "cpu"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    (out,) = (run_dir / "eval").glob("top1-fp32-*-step-00000007.json")
    report = json.loads(out.read_text())
    assert f"{report['rows'][0]['top1']:.1f}" in printed and "top-5" in printed
    assert report["val"]["samples"] == 45
    assert main([*words, "--ema", "--image-size", "48", "--crop-pct", "1"]) == 0
    assert len(list((run_dir / "eval").glob("top1-ema-px48-crop1-fp32-*-step-00000007.json"))) == 1
    for other in (["--val", str(data[0])], ["--precision", "bf16"], ["--crop-pct", "0.875"]):
        before = len(list((run_dir / "eval").glob("top1-*.json")))
        assert main([*words, *other]) == 0
        assert len(list((run_dir / "eval").glob("top1-*.json"))) == before + 1, other


def test_weights_that_diverged(run_dir: Path, data: tuple[Path, Path]) -> None:
    batches = eval_batches(Manifest.load(data[1]), 32, batch=8, workers=0)
    counts = count(lambda images: images.new_full((len(images), 3), float("nan")), labelled(batches), CPU)
    with pytest.raises(UserError, match="outputs are inf or NaN for 45 of 45 images; take a checkpoint"):
        accuracy(counts)


def test_bad_input_is_one_line(
    run_dir: Path, data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(*words: str) -> str:
        assert main(["evaluate", "top1", *words, "--workers", "0", "--device", "cpu"]) == 2
        (text,) = capsys.readouterr().err.strip().splitlines()
        return text

    val = ["--val", str(data[1])]
    mae = save_run(tmp_path / "mae", small_run("mae"))
    assert "holds no fine-tuned classifier; `mimscale train finetune_... init.weights=" in line(str(mae), *val)
    run = small_run("finetune")
    five = save_run(tmp_path / "five", run.model_copy(update={"method": run.method.model_copy(update={"classes": 5})}))
    assert "has 3 classes, and" in (text := line(str(five), *val)) and "was trained for 5" in text
    assert "--image-size 33 is not a multiple of the student's patch = 8" in line(
        str(run_dir), *val, "--image-size", "33"
    )
    assert "has no moving average" in line(str(five), *val, "--ema")
    assert "must end in .json" in line(str(run_dir), *val, "--out", "x.txt")


def test_names_and_training_images_of_the_runs_own_data(
    data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run("finetune")
    run = run.model_copy(update={"data": run.data.model_copy(update={"shards": str(data[0])})})
    own = save_run(tmp_path / "own", run)
    words = ["evaluate", "top1", str(own), "--workers", "0", "--device", "cpu", "--val"]
    assert main([*words, str(data[1])]) == 0
    made = make_image_folder(tmp_path / "images", classes=3, per_class=2, side=32, seed=5)
    last = sorted(made.iterdir())[-1]
    last.rename(made / "zebra")
    capsys.readouterr()
    assert main([*words, str(shards(made, tmp_path / "zebra"))]) == 2
    assert "label 2 is class 'zebra', output 2 of" in capsys.readouterr().err
    shutil.copytree(data[0], tmp_path / "copy")
    assert main([*words, str(tmp_path / "copy")]) == 2
    assert "is the training set itself" in capsys.readouterr().err
