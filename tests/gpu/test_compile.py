"""Compiled blocks on a GPU: the eager losses within rounding, and `auto` that measures once. Not run on one yet."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from tests import ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def trained(recipe: Path, run_dir: Path, *overrides: str) -> tuple[dict[int, float], str]:
    words = ranks.command(1, "mimscale", "train", recipe, *overrides, "--run-dir", run_dir)
    shown = subprocess.run(words, env=ranks.environment(), check=True, capture_output=True, text=True)
    return ranks.curve(run_dir), shown.stdout + shown.stderr


@pytest.mark.parametrize("ds_config", ["zero2_bf16", "zero2_fp16"])
@pytest.mark.parametrize("method", ["mae", "maskalign", "simmim"])
def test_losses_of_compiled_blocks(method: str, ds_config: str, shards: Path, tmp_path: Path) -> None:
    recipe = ranks.recipe(tmp_path, shards, method, engine={"device": "cuda", "ds_config": ds_config})
    eager, _ = trained(recipe, tmp_path / "eager", "engine.compile=off")
    for kind in ("blocks", "whole"):
        curve, shown = trained(recipe, tmp_path / kind, f"engine.compile={kind}")
        assert f"compile: {kind} (engine.compile = {kind})" in shown
        assert curve == pytest.approx(eager, rel=2e-2)


def test_auto_measures_and_a_resume_goes_on_to_the_bit(shards: Path, tmp_path: Path) -> None:
    recipe = ranks.recipe(tmp_path, shards, engine={"device": "cuda", "ds_config": "zero2_bf16"})
    _, shown = trained(recipe, tmp_path / "run")
    assert "forward and backward pass: eager" in shown
    ranks.cut_back(tmp_path / "run", tmp_path / "resumed", 8)
    _, shown = trained(recipe, tmp_path / "resumed")
    assert "(as in the checkpoint)" in shown
    assert ranks.identical(tmp_path / "run", tmp_path / "resumed")


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="the device has no fp8"
)
@pytest.mark.parametrize("kind", ["off", "blocks"])
def test_losses_of_fp8_stay_near_bf16(kind: str, shards: Path, tmp_path: Path) -> None:
    engine = {"device": "cuda", "ds_config": "zero2_bf16", "compile": kind}
    recipe = ranks.recipe(tmp_path, shards, "mae", engine=engine)
    bf16, _ = trained(recipe, tmp_path / "bf16")
    fp8, shown = trained(recipe, tmp_path / "fp8", "engine.student_fp8=true")
    assert "torchao, dynamic per-row scales" in shown
    assert fp8 != bf16 and fp8 == pytest.approx(bf16, rel=5e-2)
