"""The exponential moving average of a student, read in place of its trained weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mimscale.__main__ import main
from mimscale.checkpoint import format as checkpoint
from mimscale.convert.networks import student_from
from mimscale.methods.base import Method
from tests.convert.runs import IMAGES, build, refused, save_run, saved_run


@pytest.fixture
def averaged(tmp_path: Path) -> tuple[Path, Method, dict[str, Tensor]]:
    """A run whose moving average is another student than the trained one."""
    method, run = build("mae")
    ema = {f"student.{name}": p.detach() + 0.25 for name, p in method.student.named_parameters()}
    return save_run(tmp_path / "run", method, run, ema), method, ema


def test_only_the_student_is_replaced(averaged: tuple[Path, Method, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, method, ema = averaged
    out = tmp_path / "ours.safetensors"
    assert main(["convert", str(folder), str(out), "--to", "mimscale", "--ema"]) == 0
    expected = {**method.state_dict(), **ema}
    found = load_file(out)
    assert found.keys() == expected.keys() and all(torch.equal(found[n], t) for n, t in expected.items())
    assert json.loads((tmp_path / "ours.safetensors.json").read_text())["ema"] is True


def test_the_average_gives_other_features(averaged: tuple[Path, Method, dict[str, Tensor]]) -> None:
    folder, method, ema = averaged
    trained, _ = student_from(folder)
    average, _ = student_from(folder, ema=True)
    assert torch.equal(trained(IMAGES).tokens, method.student(IMAGES).tokens)
    method.load_state_dict({**method.state_dict(), **ema})
    assert torch.equal(average(IMAGES).tokens, method.student(IMAGES).tokens)
    assert not torch.allclose(average(IMAGES).tokens, trained(IMAGES).tokens)


def test_the_full_state_keeps_both(averaged: tuple[Path, Method, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, _, ema = averaged
    assert main(["convert", str(folder), str(tmp_path / "state"), "--to", "state"]) == 0
    assert main(["convert", str(tmp_path / "state"), str(tmp_path / "again"), "--to", "run"]) == 0
    for ema_too in (False, True):
        first, again = (
            checkpoint.load_weights(tmp_path / name / "checkpoints" / "step-00000007", ema_too)
            for name in ("run", "again")
        )
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert torch.equal(first["student.cls_token"], ema["student.cls_token"]) is ema_too


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = saved_run(tmp_path / "run", "mae")
    out = tmp_path / "out.safetensors"
    step = folder / "checkpoints" / "step-00000007"
    line = f"{step} has no moving average (kind ema); leave --ema out"
    assert line in refused([str(folder), str(out), "--to", "timm", "--ema"], capsys)
    assert "leave --ema out" in refused([str(folder), str(out), "--to", "state", "--ema"], capsys)
    assert main(["convert", str(folder), str(out), "--to", "mimscale"]) == 0
    again = [str(out), str(tmp_path / "again.safetensors"), "--to", "student", "--ema"]
    assert f"{out} is a file of weights and has no moving average" in refused(again, capsys)
