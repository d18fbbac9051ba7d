"""`timm.create_model("local-dir:FOLDER")` loads what `--to timm` writes, unchanged, and gives our features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.data import resolve_model_data_config

from mimscale.__main__ import main
from mimscale.convert.difference import random_input
from mimscale.convert.formats import timm as timm_names
from mimscale.methods.finetune import Finetune
from mimscale.methods.mae import MAE
from mimscale.models.beit import Beit
from mimscale.models.config import STUDENT_SIZES, StudentConfig
from mimscale.models.vit import ViT
from mimscale.types import IMAGENET_MEAN, IMAGENET_STD
from tests.convert.runs import IMAGES, METHODS, build, save_run, saved_run
from tests.golden import close, run_config


def from_folder(folder: Path) -> Any:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.mark.parametrize(
    ("size", "patch", "image_size", "name", "options"),
    [
        ("tiny", 16, 224, "vit_tiny_patch16_224", {}),
        ("small", 16, 224, "vit_small_patch16_224", {}),
        ("base", 16, 224, "vit_base_patch16_224", {}),
        ("base", 16, 448, "vit_base_patch16_224", {"img_size": 448}),
        ("large", 16, 224, "vit_large_patch16_224", {}),
        ("huge", 14, 224, "vit_huge_patch14_224", {}),
        ("huge", 14, 448, "vit_huge_patch14_224", {"img_size": 448}),
        ("huge", 16, 224, "vit_huge_patch14_224", {"patch_size": 16}),
        ("huge", 16, 320, "vit_huge_patch14_224", {"img_size": 320, "patch_size": 16}),
    ],
)
def test_every_size_has_its_name(size: Any, patch: int, image_size: int, name: str, options: dict[str, Any]) -> None:
    """The call fits the whole shape, parameter by parameter; nothing is allocated."""
    with torch.device("meta"):
        vit = ViT(StudentConfig(size=size, patch=patch), image_size)
        assert timm_names.create_call(vit) == (name, {"num_classes": 0, **options})
        theirs: Any = timm.create_model(name, num_classes=0, **options)
    shapes = {n: t.shape for n, t in vit.state_dict().items()}
    assert shapes == {n: t.shape for n, t in theirs.state_dict().items()}
    assert theirs.blocks[0].attn.num_heads == STUDENT_SIZES[size][2]


@pytest.mark.parametrize(
    ("width", "heads", "patch", "image_size"),
    [
        (384, 6, 16, 224),
        (768, 12, 16, 64),
        pytest.param(1024, 16, 16, 160, marks=pytest.mark.slow),
        pytest.param(1280, 16, 14, 224, marks=pytest.mark.slow),
        pytest.param(1280, 16, 16, 128, marks=pytest.mark.slow),
    ],
)
def test_timm_loads_the_folder_itself(width: int, heads: int, patch: int, image_size: int, tmp_path: Path) -> None:
    """Real widths, heads, patches and grids; one block, because ViT-H has 2.5 GB."""
    torch.manual_seed(1)
    student = {"width": width, "depth": 1, "heads": heads, "patch": patch}
    run = run_config(METHODS["mae"][1], student, image_size)
    method = MAE(run, {})
    out = tmp_path / "student"
    assert main(["convert", str(save_run(tmp_path / "run", method, run)), str(out), "--to", "timm"]) == 0
    loaded = from_folder(out)
    image = random_input(1, 3, image_size, image_size)
    close(loaded.forward_features(image), method.student(image).tokens)
    close(loaded(image), method.student(image).tokens[:, 0])


def test_the_folder_says_how_images_are_prepared(tmp_path: Path) -> None:
    method, run = build("mae")
    values = run.dump()
    values["data"] |= {"interpolation": "bilinear", "crop_pct": 0.9}
    folder = save_run(tmp_path / "run", method, type(run).model_validate(values))
    out = tmp_path / "student"
    assert main(["convert", str(folder), str(out), "--to", "timm"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["model_args"] == {"num_classes": 0, "embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 64}
    loaded = from_folder(out)
    close(loaded.forward_features(IMAGES), method.student(IMAGES).tokens)
    found = resolve_model_data_config(loaded)
    assert found["input_size"] == (3, 64, 64) and (found["interpolation"], found["crop_pct"]) == ("bilinear", 0.9)
    assert tuple(found["mean"]) == IMAGENET_MEAN and tuple(found["std"]) == IMAGENET_STD


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("positions", [None, "per_block", "relative", "absolute"])
def test_a_classifier_with_its_head(positions: str | None, pool: str, tmp_path: Path) -> None:
    beit: dict[str, Any] = {"beit": {"positions": positions}} if positions else {}
    folder, method = saved_run(tmp_path / "run", "finetune", pool=pool, **beit)
    assert isinstance(method, Finetune)
    if positions in ("per_block", "relative"):  # the tables start at zero
        for name, parameter in method.named_parameters():
            torch.nn.init.normal_(parameter) if name.endswith("table") else None
        save_run(tmp_path / "moved", method, build("finetune", pool=pool, **beit)[1])
        folder = tmp_path / "moved"
    out = tmp_path / "classifier"
    assert main(["convert", str(folder), str(out), "--to", "timm", "--with-head"]) == 0
    report = json.loads((out / "conversion.json").read_text())
    assert report["differences"].keys() == {"encoder", "logits", "read back"} and report["limit"] == 1e-5
    loaded = from_folder(out)
    assert loaded.num_classes == 3
    close(loaded(IMAGES), method.head(method.features(IMAGES)))


def test_what_mff_fused_is_left_behind(tmp_path: Path) -> None:
    """After pre-training the student is a plain ViT."""
    folder, method = saved_run(tmp_path / "run", "mff")
    out = tmp_path / "student"
    assert main(["convert", str(folder), str(out), "--to", "timm"]) == 0
    assert load_file(out / "model.safetensors").keys() == method.student.state_dict().keys()


@pytest.mark.parametrize("size", ["base", "large", "small"])
def test_simmim_is_timms_beit(size: Any) -> None:
    with torch.device("meta"):
        vit = Beit(StudentConfig(size=size), 224)
        name, options = timm_names.create_call(vit)
        theirs = timm.create_model(name, **options)
    assert name == f"beit_{'base' if size == 'small' else size}_patch16_224"
    shapes = {n: t.shape for n, t in theirs.state_dict().items() if "relative_position_index" not in n}
    assert shapes == {n: t.shape for n, t in vit.state_dict().items()}


def test_a_missing_last_norm_is_filled_in(tmp_path: Path) -> None:
    folder, method = saved_run(tmp_path / "run", "maskalign")
    out = tmp_path / "student"
    assert main(["convert", str(folder), str(out), "--to", "timm"]) == 0
    tokens = method.student(IMAGES).tokens
    close(from_folder(out).forward_features(IMAGES), F.layer_norm(tokens, (32,), eps=1e-6))
