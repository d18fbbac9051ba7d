"""CUDA graphs without a GPU: who gets them and why, and that the pieces that are captured make up the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mimscale.__main__ import main
from mimscale.config.recipes import load_recipe
from mimscale.config.run import method_class
from mimscale.engine import cuda_graphs
from mimscale.engine.config import EngineConfig
from mimscale.engine.cuda_graphs import SegmentModule, StudentGraphs
from mimscale.methods.base import Method
from mimscale.types import Batch
from tests import ranks
from tests.engine.test_compile import CPU, GPU, batches
from tests.teachers import tiny

FITS: dict[str, Any] = {"cuda_graphs": "auto", "compile": "blocks"}


@pytest.mark.parametrize(
    ("changes", "device", "stage", "accumulation", "why"),
    [
        ({}, GPU, 2, 4, ""),
        ({}, GPU, 1, 1, ""),
        ({}, CPU, 2, 1, "CUDA graphs need a CUDA device"),
        ({}, GPU, 3, 1, "ZeRO-3 gathers the weights to another address"),
        ({}, GPU, 1, 2, "below ZeRO-2 gradients are accumulated in place"),
        ({"activation_checkpointing": 1}, GPU, 2, 1, "recomputation is not captured"),
        ({"compile": "whole"}, GPU, 2, 1, "engine.compile = whole leaves no segments"),
        ({"backend": "torch"}, GPU, 0, 1, "cannot be captured by parts"),
    ],
)
def test_who_is_captured_and_why_not(
    changes: dict[str, Any], device: torch.device, stage: int, accumulation: int, why: str
) -> None:
    config = EngineConfig(**{**FITS, **changes})
    found = cuda_graphs.fault(config, device, stage, accumulation)
    assert why in found and bool(why) is bool(found)
    assert cuda_graphs.choose("on", found)[0] is (not why)
    assert cuda_graphs.choose("auto", found) == (not why, found or "engine.cuda_graphs = auto")
    assert cuda_graphs.choose("off", found) == (False, "engine.cuda_graphs = off")


def test_on_is_refused_on_a_cpu_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", str(ranks.recipe(tmp_path, tmp_path)), "engine.cuda_graphs=on", "--run-dir", str(tmp_path / "r")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "engine.cuda_graphs = on: CUDA graphs need a CUDA device; or set engine.cuda_graphs = auto" in error
    assert error.count("\n") == 1 and not (tmp_path / "r").exists()


def test_auto_on_a_cpu_says_why_not() -> None:
    notes: list[str] = []
    StudentGraphs(torch.nn.Linear(1, 1), EngineConfig(cuda_graphs="auto"), CPU, 2, 1, notes)
    assert notes == ["cuda_graphs: off for the student (CUDA graphs need a CUDA device)"]
    ensemble = tiny.ensemble(tiny.timm_config("vit_base_patch16_224.dino", None, random=True), 32)
    before = ensemble(tiny.images(2, 32))["t"]
    ensemble.use_cuda_graphs()
    assert ensemble.notes[-1] == "cuda_graphs: off for teachers.t (CUDA graphs need a CUDA device)"
    assert torch.equal(ensemble(tiny.images(2, 32))["t"].levels[2], before.levels[2])


def built(folder: Path, name: str) -> tuple[Method, list[Batch]]:
    run = load_recipe(str(ranks.recipe(folder, folder, name)), ["student.depth=5", *LEVELS.get(name, ())])
    torch.manual_seed(0)
    method = method_class(run.method.name)(run, {})
    return method, batches(run, method, 3)


LEVELS = {"mff": ("method.fusion.levels=[0,2,4]",)}


def uncaptured(modules: tuple[SegmentModule, ...], arguments: tuple[Any, ...]) -> tuple[Callable[..., Any], ...]:
    """As `make_graphed_callables`, but each piece is computed instead of replayed, and counted."""

    def counted(module: SegmentModule) -> Callable[..., Any]:
        def run(*tensors: torch.Tensor) -> Any:
            REPLAYED.append(module)
            return module(*tensors)

        return run

    for module, tensors in zip(modules, arguments, strict=True):
        assert all(isinstance(tensor, torch.Tensor) for tensor in tensors)
        assert sum(p.numel() for p in module.parameters()) == sum(
            p.numel() for b in module.blocks for p in b.parameters()
        )
    return tuple(map(counted, modules))


REPLAYED: list[SegmentModule] = []


def gradients(method: Method, batch: Batch) -> list[torch.Tensor]:
    loss = method(batch, {})["loss"]
    return [loss.detach(), *torch.autograd.grad(loss, list(method.parameters()))]


@pytest.mark.parametrize(("name", "pieces"), [("mae", 3), ("mff", 3), ("simmim", 2), ("convmae", 5)])
def test_pieces_make_up_the_forward_pass(name: str, pieces: int, tmp_path: Path) -> None:
    """Loss and every gradient to the bit; what was not captured is computed as before."""
    method, (first, second, third) = built(tmp_path, name)
    expected = [gradients(method, batch) for batch in (first, second)]
    with torch.no_grad():
        features = method.visualise(third, {}).features
    graphs = StudentGraphs(method, EngineConfig(cuda_graphs="auto"), CPU, 2, 1, [], capture=uncaptured)
    graphs._wanted = True  # as on a GPU
    graphs.before_forward(lambda: method(first, {})["loss"])
    REPLAYED.clear()
    for batch, plain in zip((first, second), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(gradients(method, batch), plain, strict=True))
    assert len(REPLAYED) == 2 * pieces and len(set(REPLAYED)) == pieces
    assert all(parameter.grad is None for parameter in method.parameters())

    ours = method.visualise(third, {}).features
    assert ours is not None and features is not None and torch.equal(ours, features)
    smaller = replace(third, images=third.images[:2], noise={k: v[:2] for k, v in third.noise.items()})
    gradients(method, smaller)
    assert len(REPLAYED) == 2 * pieces


def test_blocks_that_run_twice_are_not_captured(tmp_path: Path) -> None:
    method, (first, *_) = built(tmp_path, "mae")
    notes: list[str] = []
    graphs = StudentGraphs(method, EngineConfig(cuda_graphs="auto"), CPU, 2, 1, notes, capture=uncaptured)
    graphs._wanted = True
    graphs.before_forward(lambda: method(first, {})["loss"] + method(first, {})["loss"])
    assert "a block runs more than once" in notes[-1]
    assert not any(hasattr(module, "runner") for module in method.modules())
