"""int8 and fp8 teachers: what is quantised, what stays, how far the targets move, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mimscale.errors import UserError
from mimscale.teachers import quantise
from mimscale.teachers.config import TeacherConfig
from mimscale.types import TeacherNeeds
from tests.teachers import tiny

needs_torchao = pytest.mark.skipif(bool(quantise.unavailable()), reason="torchao does not fit this torch")
DTYPE = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
DINO = "vit_base_patch16_224.dino"


def family(name: str, folder: Path) -> tuple[int, Any]:
    """(image size, precision -> configuration) of a small teacher that has a file."""
    size = 56 if "14" in name else 64
    if name == "ViT-B-16":
        path = tiny.saved(tiny.open_clip_model(name, size), folder / "w.safetensors")
        return size, lambda precision: tiny.open_clip_config(name, path, precision=precision)
    path = tiny.saved(tiny.timm_model(name, size), folder / "w.safetensors")
    return size, lambda precision: tiny.timm_config(name, path, precision=precision)


COSINE = 0.995
"""Between the features of a teacher in 8 bit and in bf16, which is what an 8-bit teacher has to keep."""


def cosine(ours: Tensor, reference: Tensor) -> float:
    """Mean over all tokens."""
    return float(F.cosine_similarity(ours.float(), reference.float(), dim=-1).mean())


def error(ours: Tensor, reference: Tensor) -> float:
    return float((ours.float() - reference).norm() / reference.norm())


@needs_torchao
@pytest.mark.parametrize(("precision", "limit"), [("int8", 0.05), ("fp8", 0.13)])
@pytest.mark.parametrize("name", [DINO, "vit_base_patch16_dinov3", "eva02_base_patch14_224", "ViT-B-16"])
def test_targets_stay_near(name: str, precision: str, limit: float, tmp_path: Path) -> None:
    size, config = family(name, tmp_path)
    exact, bf16, low = (tiny.ensemble(config(p), size)(tiny.images(4, size))["t"] for p in ("fp32", "bf16", precision))
    assert exact.cls_attention is not None and low.cls_attention is not None
    assert low.levels[2].dtype == torch.bfloat16 and low.cls_attention.dtype == torch.float32
    assert error(low.levels[2], bf16.levels[2]) > 0  # quantised; whether that or bf16 rounds more depends on the model
    assert error(low.levels[2], exact.levels[2]) < limit
    assert 0 < error(low.cls_attention, exact.cls_attention) < limit
    assert cosine(low.levels[2], bf16.levels[2]) >= COSINE


@needs_torchao
@pytest.mark.parametrize("precision", DTYPE)
def test_direction_of_the_features_after_twelve_blocks(precision: str) -> None:
    """Rounding adds up over the depth of a ViT-B."""
    options = {"embed_dim": 192, "depth": 12, "num_heads": 3}
    low, bf16 = (
        tiny.ensemble(
            tiny.timm_config(DINO, None, random=True, precision=p, options=options), 64, TeacherNeeds(levels=(11,))
        )(tiny.images(4, 64))["t"].levels[11]
        for p in (precision, "bf16")
    )
    assert COSINE <= cosine(low, bf16) < 1 - 1e-6


@needs_torchao
@pytest.mark.parametrize("precision", DTYPE)
def test_what_is_quantised_and_what_stays(precision: str, tmp_path: Path) -> None:
    size, config = family(DINO, tmp_path)
    teacher = tiny.ensemble(config(precision), size).teachers["t"]
    eight = {name for name, p in teacher.named_parameters() if hasattr(p, "qdata")}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected = {f"tower.blocks.{i}.{layer}.weight" for i in range(3) for layer in layers}
    assert eight == expected - {"tower.blocks.2.attn.qkv.weight", "tower.blocks.2.attn.proj.weight"}
    for name, parameter in teacher.named_parameters():
        data: Any = parameter
        assert (data.qdata if name in eight else data).dtype == (DTYPE[precision] if name in eight else torch.bfloat16)
        assert not parameter.requires_grad


@needs_torchao
def test_row_of_the_first_block_is_that_of_bf16(tmp_path: Path) -> None:
    """With one block nothing before the row is quantised."""
    config = tiny.timm_config(DINO, None, random=True, precision="fp8", options={**tiny.TIMM, "depth": 1})
    ensembles = [tiny.ensemble(c, 64, TeacherNeeds(cls_attention=True))
             for c in (config, config.model_copy(update={"precision": "bf16"}))]  # fmt: skip
    ours, reference = (ensemble(tiny.images(2, 64))["t"].cls_attention for ensemble in ensembles)
    assert ours is not None and reference is not None and torch.equal(ours, reference)


@needs_torchao
def test_fp8_is_one_scale_per_row_and_per_token(tmp_path: Path) -> None:
    """Against the definition: largest magnitude of each row at 448 (scale from bf16), e4m3, multiplied exactly."""
    size, config = family(DINO, tmp_path)
    plain = tiny.ensemble(config("bf16"), size).teachers["t"].blocks[0].mlp.fc1  # type: ignore[union-attr]
    low = tiny.ensemble(config("fp8"), size).teachers["t"].blocks[0].mlp.fc1  # type: ignore[union-attr]
    tokens = torch.randn(2, 5, 32).bfloat16()

    def rounded(values: Tensor) -> Tensor:
        scale = (values.abs().amax(-1, keepdim=True) / 448).float()
        return (values.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    expected = F.linear(rounded(tokens), rounded(plain.weight), plain.bias.float())  # type: ignore[union-attr,arg-type]
    assert error(low(tokens), expected) < 4e-3  # type: ignore[operator]  # bf16's rounding of the result
    assert error(low(tokens), plain(tokens).float()) > 2e-2  # type: ignore[operator]


@needs_torchao
def test_sides_that_gpus_cannot_multiply_stay(tmp_path: Path) -> None:
    config = tiny.timm_config("eva02_base_patch14_224", None, random=True, precision="int8")
    assert 8 * 32 // 3 % 16
    assert not any("mlp" in name for name, p in tiny.ensemble(config, 56).teachers["t"].named_parameters()
                   if hasattr(p, "qdata"))  # fmt: skip


@pytest.fixture
def without_torchao(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    quantise.unavailable.cache_clear()
    yield
    quantise.unavailable.cache_clear()


def test_without_the_extra_it_is_one_line(without_torchao: None) -> None:
    config = tiny.timm_config(DINO, None, random=True, precision="fp8")
    with pytest.raises(UserError, match=r"teachers.t.precision = fp8 needs .*pip install -e '.\[fp8\]'") as error:
        tiny.describe(config, 64)
    assert "\n" not in str(error.value)
    assert tiny.describe(config.model_copy(update={"precision": "bf16"}), 64).depth == 3


def test_unknown_precision() -> None:
    with pytest.raises(ValueError, match="'fp32', 'bf16', 'fp16', 'int8' or 'fp8'"):
        TeacherConfig(library="timm", model=DINO, precision="fp4")
