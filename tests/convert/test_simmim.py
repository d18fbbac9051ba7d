"""SimMIM's checkpoints in and out: another network than the plain ViT, and names of its own."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.beit import Beit as TimmBeit

from mimscale.__main__ import main
from mimscale.convert.formats import simmim
from mimscale.convert.names import same
from mimscale.convert.networks import student_from
from mimscale.methods.simmim import SimMIM
from mimscale.models.beit import Beit
from tests import golden
from tests.convert.runs import IMAGES, STUDENT, save_run, saved_run
from tests.golden import close, run_config


@pytest.fixture(params=[{}, {"positions": "absolute", "layer_scale": None}], ids=["relative", "absolute"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, SimMIM]:
    torch.manual_seed(1)
    run = run_config({"name": "simmim", **request.param}, STUDENT)
    method = SimMIM(run, {})
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return save_run(tmp_path / "run", method, run), method


def test_run_to_timm(saved: tuple[Path, SimMIM], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, method = saved
    out = tmp_path / "student"
    assert main(["convert", str(folder), "--to", "timm", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"timm.create_model('local-dir:{out}', pretrained=True)" in printed and "encoder differs by" in printed
    reference = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert isinstance(reference, TimmBeit)
    close(reference.forward_features(IMAGES), method.student(IMAGES).tokens)

    for source in (folder, out):
        student, info = student_from(source)
        assert isinstance(student, Beit) and (info.config.heads, info.image_size, info.final_norm) == (2, 64, True)
        assert (student.positions, student.layer_scale) == (method.student.positions, method.student.layer_scale)
        close(student(IMAGES).tokens, method.student(IMAGES).tokens)


def test_run_to_official_and_back(saved: tuple[Path, SimMIM], tmp_path: Path) -> None:
    folder, method = saved
    official, ours = tmp_path / "official.pth", tmp_path / "ours.safetensors"
    assert main(["convert", str(folder), str(official), "--to", "official"]) == 0
    recipe = str(folder / "config.yaml")
    assert main(["convert", str(official), str(ours), "--to", "mimscale", "--recipe", recipe]) == 0
    back, original = load_file(ours), method.state_dict()
    assert back.keys() == original.keys() and all(torch.equal(back[n], t) for n, t in original.items())

    student, _ = student_from(official, heads=2)  # an official file as it is
    close(student(IMAGES).tokens, method.student(IMAGES).tokens)


@pytest.mark.parametrize("positions", ["per_block", "relative", "absolute"])
def test_finetuned_to_official_and_back(positions: str, tmp_path: Path) -> None:
    folder, method = saved_run(tmp_path / "run", "finetune", beit={"positions": positions})
    official, ours = tmp_path / "official.safetensors", tmp_path / "ours.safetensors"
    assert main(["convert", str(folder), str(official), "--to", "official"]) == 0
    names = {name.removeprefix("student.") for name in method.state_dict()}
    indices = {n.replace("bias_table", "index") for n in names if n.endswith("relative_position_bias_table")}
    assert load_file(official).keys() == names | indices
    recipe = str(folder / "config.yaml")
    assert main(["convert", str(official), str(ours), "--to", "mimscale", "--recipe", recipe]) == 0
    assert same(load_file(ours), method.state_dict())
    student, info = student_from(official, heads=2)
    assert isinstance(student, Beit) and student.positions == positions and not info.final_norm
    close(student(IMAGES).tokens, method.student(IMAGES).tokens)


def test_official_training_file(saved: tuple[Path, SimMIM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The released files carry their configuration, an object of a package that is not needed to read them."""
    module, method = types.ModuleType("yacs.config"), saved[1]
    CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    module.CfgNode = CfgNode  # type: ignore[attr-defined]
    node = CfgNode(MODEL=CfgNode(TYPE="vit"))
    node.__dict__["__immutable__"] = True
    with monkeypatch.context() as patch:
        for name in ("yacs", "yacs.config"):
            patch.setitem(sys.modules, name, module)
        state = simmim.to_official(method.state_dict()).weights
        torch.save({"model": state, "config": node, "epoch": 3}, tmp_path / "official.pth")
    student, _ = student_from(tmp_path / "official.pth", heads=2)
    close(student(IMAGES).tokens, method.student(IMAGES).tokens)


@pytest.mark.parametrize("name", ["simmim_dev", "simmim_ape"])
def test_official_names(name: str) -> None:
    """Exactly the official program's state, the index of its bias table included."""
    state = golden.load(name).part("state")
    again = simmim.to_official(simmim.from_official(state).weights).weights
    assert again.keys() == state.keys()
    assert all(again[n].dtype == t.dtype and torch.equal(again[n], t) for n, t in state.items())


def test_positions_are_resized(saved: tuple[Path, SimMIM]) -> None:
    folder, method = saved
    larger, info = student_from(folder, image_size=96)
    assert info.image_size == 96 and larger(torch.zeros(1, 3, 96, 96)).tokens.shape == (1, 37, 32)
    assert larger.positions == method.student.positions
