"""The fast path `teacher_kernels`: the library's numbers, in fewer kernels, without a tensor [B, H, N, N]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mimscale.teachers.config import TeacherConfig
from mimscale.teachers.ensemble import TeacherEnsemble, build_skeletons
from mimscale.teachers.kernels import SelfAttention, fold_quickgelu, scale_parameters
from mimscale.types import Targets
from tests.operators import Attentions, Operators, attention_matrices
from tests.teachers import tiny
from tests.teachers.test_timm import ROTARY, SIZES

TIMM_CLIP = "vit_base_patch16_clip_quickgelu_224"
OPEN_CLIP = "ViT-B-16-quickgelu"


def saved(name: str, folder: Path) -> Any:
    """precision -> the configuration of a teacher with these weights."""
    if name.startswith("ViT"):
        path = tiny.saved(tiny.open_clip_model(name, 64), folder / "w.safetensors")
        return lambda precision: tiny.open_clip_config(name, path, precision=precision)
    path = tiny.saved(tiny.timm_model(name, 64), folder / "w.safetensors")
    return lambda precision: tiny.timm_config(name, path, precision=precision)


def targets(config: TeacherConfig, fused: bool, size: int = 64) -> Targets:
    configs = {"t": config}
    ensemble = TeacherEnsemble(configs, build_skeletons(configs, size), {"t": tiny.ALL}, size, tiny.CPU, fused)
    return ensemble(tiny.images(4, size))["t"]


def error(ours: Tensor, reference: Tensor) -> float:
    return float((ours.float() - reference).norm() / reference.norm())


@pytest.mark.parametrize("name", [TIMM_CLIP, OPEN_CLIP])
def test_equals_the_library(name: str, tmp_path: Path) -> None:
    config = saved(name, tmp_path)
    with Operators() as ours:
        fused = targets(config("fp32"), True)
    with Operators() as theirs:
        plain = targets(config("fp32"), False)
    for level in plain.levels:
        assert error(fused.levels[level], plain.levels[level]) < 2e-6
        assert error(fused.cls[level], plain.cls[level]) < 2e-6
    assert fused.cls_attention is not None and plain.cls_attention is not None
    assert error(fused.cls_attention, plain.cls_attention) < 2e-6
    assert (ours.names["aten.silu.default"], ours.names["aten.sigmoid.default"]) == (3, 0)
    assert (theirs.names["aten.silu.default"], theirs.names["aten.sigmoid.default"]) == (0, 3)


@pytest.mark.parametrize(
    ("name", "fused", "note"),
    [
        (OPEN_CLIP, True, "on for teachers.t (QuickGELU in 3 MLPs, SDPA in 3 attentions)"),
        (TIMM_CLIP, True, "on for teachers.t (QuickGELU in 3 MLPs)"),
        (TIMM_CLIP, False, "off for teachers.t (as engine.plain says)"),
        ("vit_base_patch16_224.dino", True, "off for teachers.t (nothing in it to replace)"),
    ],
)
def test_a_run_says_what_was_replaced(name: str, fused: bool, note: str) -> None:
    kind = tiny.open_clip_config if name.startswith("ViT") else tiny.timm_config
    configs = {"t": kind(name, None, random=True)}
    ensemble = TeacherEnsemble(configs, build_skeletons(configs, 64), {"t": tiny.ALL}, 64, tiny.CPU, fused)
    assert f"teacher_kernels: {note}" in ensemble.notes


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", [TIMM_CLIP, OPEN_CLIP])
def test_rounds_no_more_than_the_library_in_16_bit(name: str, precision: str, tmp_path: Path) -> None:
    config = saved(name, tmp_path)
    exact = targets(config("fp32"), False).levels[2]
    fused, plain = (error(targets(config(precision), kind).levels[2], exact) for kind in (True, False))
    assert 0 < fused < 1.25 * plain


def test_random_weights_are_folded_too() -> None:
    config = tiny.timm_config(TIMM_CLIP, None, random=True)
    assert error(targets(config, True).levels[2], targets(config, False).levels[2]) < 2e-6


def test_only_quickgelu_between_two_layers_is_folded() -> None:
    class QuickGELU(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(1.702 * x)

    def mlp(*between: nn.Module) -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 8, bias=False), *between, nn.Linear(8, 4))

    tower = nn.Sequential(mlp(QuickGELU()), mlp(nn.GELU()), mlp(QuickGELU(), nn.LayerNorm(8)))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    before = tower(x)
    factors = fold_quickgelu(tower)
    assert list(factors) == ["0.0.weight", "0.2.weight"]
    scale_parameters(tower, dict(factors))
    torch.testing.assert_close(tower(x), before)
    assert [type(part[1]).__name__ for part in tower] == ["SiLU", "GELU", "QuickGELU"]  # type: ignore[index]


TEACHERS = [*SIZES.items(), *ROTARY.items(), ("ViT-B-16", 64), (OPEN_CLIP, 64)]


@pytest.mark.parametrize(("name", "size"), TEACHERS)
def test_no_attention_matrix(name: str, size: int) -> None:
    """In open_clip's own modules PyTorch's kernel makes one where no operator shows it."""
    kind = tiny.open_clip_config if name.startswith("ViT") else tiny.timm_config
    config = kind(name, None, random=True)
    needs = {"t": tiny.TeacherNeeds(levels=(0, 1, 2), cls_attention=tiny.describe(config, size).has_cls)}
    ensemble = TeacherEnsemble({"t": config}, build_skeletons({"t": config}, size), needs, size, tiny.CPU)
    with Attentions() as attentions, Operators() as operators:
        ensemble(tiny.images(2, size))
    assert len(attentions.calls) == 3 and not attention_matrices(operators, attentions)
    assert not [operator for operator in operators.names if "native_multi_head" in operator]


def test_self_attention_is_that_of_the_library() -> None:
    torch.manual_seed(2)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True)
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(SelfAttention(theirs)(x, x, x, need_weights=False)[0], theirs(x, x, x)[0])
    assert SelfAttention(theirs).state_dict().keys() == theirs.state_dict().keys()
