"""`mimscale doctor --teacher NAME`: the table of precisions, where the weights came from, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from PIL import Image

from mimscale.__main__ import main
from mimscale.doctor.teacher import load_images
from mimscale.teachers import quantise
from tests import ranks
from tests.teachers import tiny

SMALL = "test_vit.r160_in1k"
FILE = "vit_tiny_patch16_224"
OPTIONS = {"embed_dim": 32, "depth": 3, "num_heads": 4, "patch_size": 8}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """MaskAlign with a teacher whose weights are in a file."""
    path = tiny.saved(tiny.timm_model(FILE, 32, **OPTIONS), tmp_path / "w.safetensors")
    teacher = {"library": "timm", "model": FILE, "weights": str(path), "options": OPTIONS, "random": False}
    return str(ranks.recipe(tmp_path, tmp_path, "maskalign", teachers={"tiny": teacher}))


def test_a_teacher_of_a_recipe(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", recipe, "--teacher", "tiny"]) == 0
    out = capsys.readouterr().out
    assert f"timm {FILE}: 32 wide, 3 blocks, 4x4 patches at 32 px, with class token" in out
    assert "w.safetensors" in out and "trained weights" in out and "RANDOM" not in out
    assert re.search(r"student +┃ +192 px", out) and re.search(r"patch 16 +│ 96 \(12x12\) +│ - +│ 112 \(14x14\)", out)
    errors = {}
    for precision in ("bf16", "fp16") + (() if quantise.unavailable() else ("int8", "fp8")):
        row = re.search(rf"│ {precision} +│ 1 +│ ([\d.e-]+) +│ ([\d.]+) +│ [\d.]+ +│ ([\d.]+)", out)
        assert row, precision
        errors[precision] = float(row[1])
        assert float(row[2]) > 0.99 and float(row[3]) > 0.7
    assert 0 < errors["fp16"] < errors["bf16"] < errors.get("fp8", 1)


def test_random_weights_are_labelled_and_levels_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--teacher", SMALL, "--levels", "2,0", "--image-size", "64"]) == 0
    out = capsys.readouterr().out
    assert "weights: RANDOM INITIALISATION" in out and "timm/test_vit.r160_in1k is not in the local cache" in out
    assert "random initialisation, on cpu" in out and "trained weights" not in out
    assert re.findall(r"│ bf16 +│ (\d)", out) == ["0"] and re.search(r"\n│ +│ 2 +│", out)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--teacher", "vit_bas_patch16_dinov3"],
            "neither timm nor open_clip has it; did you mean vit_base_patch16",
        ),
        (["--teacher", "ViT-B-61"], "did you mean ViT-B-16"),
        (["--teacher", "vit_base_patch16_224.dinoo"], "no tag 'dinoo' for vit_base_patch16_224; choose one of"),
        (["--teacher", "crossvit_9_240.in1k"], "timm cannot build crossvit_9_240"),
        (["--teacher", SMALL, "--levels", "99"], "--levels 99: teacher has blocks 0 to "),
        (["--teacher", SMALL, "--levels", "last"], "--levels last: give numbers from 0 to"),
        (["--teacher", SMALL, "--images", "absent.png"], "--images absent.png: .*No such file.*give image files"),
        (["--teacher", SMALL, "--images", __file__], "--images .*give image files"),
        (["--teacher", SMALL, "--weights", "absent.pth"], "absent.pth does not exist"),
        (["--teacher", SMALL, "--image-size", "70"], "image size 70 is not a multiple of the patch 16"),
        (["RECIPE", "--teacher", "clip"], "--teacher clip: the recipe's teachers are tiny; choose one"),
        (["RECIPE", "--teacher", "tiny", "--image-size", "64"], "are for a teacher without a recipe"),
    ],
)
def test_refusals(arguments: list[str], line: str, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *(recipe if word == "RECIPE" else word for word in arguments)]) == 2
    err = capsys.readouterr().err
    assert re.search(line, err) and err.count("\n") == 1


def test_crops_are_the_two_ends_of_an_image(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (20, 0, 40, 20))
    image.save(tmp_path / "p.png")
    images, what = load_images([tmp_path / "p.png"], 16)
    assert what == "1 given by --images, 2 crops of each" and images.shape == (2, 3, 16, 16)
    low, high = ((v - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225]) for v in (0.0, 1.0))
    torch.testing.assert_close(images[0].mean((1, 2)), low, atol=1e-5, rtol=0)
    torch.testing.assert_close(images[1].mean((1, 2)), high, atol=1e-5, rtol=0)
