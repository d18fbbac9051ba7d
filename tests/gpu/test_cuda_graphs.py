"""CUDA graphs give the bits of the eager student and teachers, step after step. Not run on a GPU yet."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from mimscale.teachers.cuda_graphs import GraphedTeacher
from mimscale.types import TeacherNeeds
from tests import ranks
from tests.teachers import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("kind", ["off", "blocks"])
@pytest.mark.parametrize("method", ["mae", "maskalign", "simmim"])
def test_a_run_with_graphs_is_the_run_without(method: str, kind: str, shards: Path, tmp_path: Path) -> None:
    """With accumulation (two micro-batches per step) and drop path, at ZeRO-2 in bf16."""
    recipe = ranks.recipe(tmp_path, shards, method, engine={"device": "cuda", "max_micro_batch": 8, "compile": kind})
    curves = []
    for graphs in ("off", "on"):
        run_dir = tmp_path / graphs
        overrides = ["engine.ds_config=zero2_bf16", f"engine.cuda_graphs={graphs}"]
        words = ranks.command(1, "mimscale", "train", recipe, *overrides, "--run-dir", run_dir)
        shown = subprocess.run(words, env=ranks.environment(), check=True, capture_output=True, text=True)
        assert f"cuda_graphs: {graphs} for the student" in shown.stdout + shown.stderr
        curves.append(ranks.curve(run_dir))
    assert curves[0] == curves[1] and len(curves[0]) == 12


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_teacher_as_one_graph(precision: str, compiled: bool) -> None:
    """Equal targets, also after the next call; another batch size is computed without the graph."""
    device = torch.device("cuda")
    config = tiny.timm_config("vit_base_patch16_dinov3", None, random=True, precision=precision, compile=compiled,
                              options={"embed_dim": 128, "depth": 3, "num_heads": 4})  # fmt: skip
    ensemble = tiny.ensemble(config, 64, TeacherNeeds(levels=(0, 2), cls_attention=True), device)
    batches = [tiny.images(count, 64, seed).to(device) for seed, count in enumerate((8, 8, 4))]
    plain = [ensemble(images)["t"] for images in batches]
    ensemble.use_cuda_graphs()
    assert isinstance(ensemble._calls["t"], GraphedTeacher)
    graphed = [ensemble(images)["t"] for images in batches]
    torch.cuda.synchronize()
    for ours, expected in zip(graphed, plain, strict=True):
        assert ours.cls_attention is not None and expected.cls_attention is not None
        assert torch.equal(ours.cls_attention, expected.cls_attention)
        assert all(torch.equal(ours.levels[level], expected.levels[level]) for level in (0, 2))
        assert all(torch.equal(ours.cls[level], expected.cls[level]) for level in (0, 2))
