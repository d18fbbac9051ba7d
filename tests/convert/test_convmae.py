"""ConvMAE's checkpoints in and out, and its encoder as a frozen network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mimscale.__main__ import main
from mimscale.checkpoint import run_folder
from mimscale.config.run import RunConfig
from mimscale.convert.formats import convmae, finetune
from mimscale.convert.networks import student_from
from mimscale.errors import UserError
from mimscale.evals.features import frozen, random_like
from mimscale.methods.base import Method
from mimscale.methods.convmae import ConvMAE
from mimscale.methods.finetune import Finetune
from mimscale.methods.mrmae import MRMAE
from mimscale.models.convvit import ConvViT
from tests import golden
from tests.convert.runs import IMAGES, refused, save_run
from tests.golden import close, run_config
from tests.methods.test_convmae import SECTION, STUDENT, sections
from tests.methods.test_mrmae import CLIP, STAGES


def build(name: str) -> tuple[Method, RunConfig]:
    torch.manual_seed(1)
    if name == "convmae":
        run = run_config(SECTION, STUDENT)
        return ConvMAE(run, {}), run
    if name == "finetune":
        run = run_config({"name": "finetune", "classes": 3, "stages": SECTION["stages"]}, STUDENT)
        return Finetune(run, {}), run
    run = run_config({**SECTION, "name": "mrmae", "stages": STAGES}, STUDENT)
    return MRMAE(run, {"clip": CLIP}), run


@pytest.mark.parametrize("name", ["convmae", "finetune"])
def test_run_to_official_and_back(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method, run = build(name)
    folder = save_run(tmp_path / "run", method, run)
    official, ours = tmp_path / "official.pth", tmp_path / "ours.safetensors"
    assert main(["convert", str(folder), str(official), "--to", "official"]) == 0
    assert "mapped back, every tensor is the same" in capsys.readouterr().out
    recipe = str(folder / "config.yaml")
    assert main(["convert", str(official), str(ours), "--to", "mimscale", "--recipe", recipe]) == 0
    back, original = load_file(ours), method.state_dict()
    assert back.keys() == original.keys() and all(torch.equal(back[n], t) for n, t in original.items())
    assert "which timm does not have" in refused([str(folder), str(tmp_path / "out.pth"), "--to", "timm"], capsys)


@pytest.mark.parametrize("file", ["convmae_dev", "convvit_finetune_dev"])
def test_official_names(file: str) -> None:
    """Exactly the names of the official programs' states, both ways."""
    state = golden.load(file).part("state")
    if file == "convmae_dev":
        again = convmae.to_official(convmae.from_official(state).weights).weights
    else:
        again = finetune.to_official(finetune.from_official(state).weights).weights
    assert again.keys() == state.keys() and all(torch.equal(again[n], t) for n, t in state.items())


def test_official_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    g = golden.load("convmae_dev")
    path = tmp_path / "official.pth"
    torch.save({"model": g.part("state")}, path)
    student, info = student_from(path, heads=g.config["heads"])
    assert isinstance(student, ConvViT) and info.stages == student.stages and info.image_size == g.config["img"]
    expected = sections(g.config)[1]
    assert {n: list(v) if isinstance(v, tuple) else v for n, v in student.stages.model_dump().items()} == {
        **expected,
        "patches": [4, 2, 2],
        "class_token": False,
    }
    close(student(g["input/images"], g["mask/ids_keep"]).tokens, g["latent"])
    with pytest.raises(UserError, match="give the heads"):
        student_from(path)
    broken = {name: t for name, t in g.part("state").items() if not name.startswith("patch_embed3")}
    torch.save({"model": broken}, path)
    with pytest.raises(UserError, match="no ConvMAE encoder: patch_embed3.proj.weight is missing"):
        student_from(path)

    method, run = build("convmae")
    run_folder.create(tmp_path / "run", run)
    recipe = ["--recipe", str(tmp_path / "run" / "config.yaml")]
    state = convmae.to_official(method.state_dict()).weights
    encoder: dict[str, Any] = {name: t for name, t in state.items() if not name.startswith("stage")}
    torch.save({"model": encoder}, path)
    out = str(tmp_path / "out.safetensors")
    assert "not a whole convmae model" in refused([str(path), out, "--to", "mimscale", *recipe], capsys)


@pytest.mark.parametrize("name", ["convmae", "finetune", "mrmae"])
def test_student_of_a_run(name: str, tmp_path: Path) -> None:
    method, run = build(name)
    folder = save_run(tmp_path / "run", method, run)
    student, info = student_from(folder)
    assert isinstance(student, ConvViT) and info.method == name
    assert torch.equal(student(IMAGES).tokens, method.student(IMAGES).tokens)
    larger, _ = student_from(folder, image_size=96)
    assert larger(torch.zeros(1, 3, 96, 96)).tokens.shape == (1, 36 + student.prefix, 32)
    pools: list[Any] = ["mean", "cls"] if name == "mrmae" else ["mean"]
    tokens = student(IMAGES).tokens
    if name == "finetune":
        tokens = torch.nn.functional.layer_norm(tokens, (32,), eps=1e-6)
    features = frozen(student, pools)(IMAGES)
    close(features["mean"], tokens[:, student.prefix :].mean(1))
    if name != "mrmae":
        with pytest.raises(UserError, match="no class token; choose --pool mean"):
            frozen(student, ["cls"])
    fresh = random_like(student, 3)
    shapes = {n: t.shape for n, t in student.state_dict().items()}
    assert shapes.items() <= {n: t.shape for n, t in fresh.state_dict().items()}.items()
