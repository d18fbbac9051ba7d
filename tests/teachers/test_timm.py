"""timm's models: our walk equals timm's own forward, the row equals the full attention matrix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from mimscale.config.recipes import load_recipe
from mimscale.errors import UserError
from mimscale.teachers.ensemble import build_skeleton
from mimscale.types import TeacherNeeds
from tests import golden
from tests.teachers import tiny

SIZES = {
    "vit_base_patch16_clip_quickgelu_224": 64,  # norm before the blocks, no patch bias
    "vit_base_patch16_224.dino": 64,
    "vit_base_patch14_dinov2": 56,  # layer scale
    "vit_base_patch14_reg4_dinov2": 56,  # registers, position table without a row for the class token
    "vit_base_patch16_siglip_224": 64,  # no class token
    "deit3_small_patch16_224": 64,
    "test_vit": 64,  # timm's default here is a model for any size
}
ROTARY = {
    "vit_base_patch16_dinov3": 64,  # registers, halves rotated, no position table
    "eva02_base_patch14_224": 56,  # separate projections, pairs rotated, scaled to a reference grid
    "vit_pe_core_base_patch16_224": 64,  # norm before the blocks
    "vit_base_patch16_rope_reg1_gap_256": 64,  # a register and no class token; biases beside the projection
    "eva_giant_patch14_224": 56,  # no rotation
}


def full_attention(model: Any, pixels: Tensor) -> Tensor:
    """[B, H, N, N] of the last block, from timm's unfused path."""
    caught: list[Tensor] = []
    attention = model.blocks[-1].attn
    attention.fused_attn = False
    handle = attention.attn_drop.register_forward_hook(lambda module, inputs, output: caught.append(output))
    model.forward_features(pixels)
    handle.remove()
    return caught[0]


CASES = [(name, size, {"qk_norm": norm}) for name, size in SIZES.items() for norm in (False, True)]
CASES += [(name, size, {"dynamic_img_size": False}) for name, size in ROTARY.items()]


@pytest.mark.parametrize(("name", "size", "options"), CASES)
@torch.no_grad()
def test_equals_timm(name: str, size: int, options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny.timm_model(name, size, **options)
    options.pop("dynamic_img_size", None)  # the adapter's own
    path = tiny.saved(model, tmp_path / "w.safetensors")
    config = tiny.timm_config(name, path, options={**tiny.TIMM, **options})
    info = tiny.describe(config, size)
    needs = TeacherNeeds(levels=(0, 1, 2), cls_attention=info.has_cls)
    ensemble = tiny.ensemble(config, size, needs)
    images = tiny.images(2, size)
    targets = ensemble(images)["t"]
    pixels = ensemble.teachers["t"].preprocess(images)

    intermediates = model.forward_intermediates(
        pixels, output_fmt="NLC", return_prefix_tokens=info.has_cls, intermediates_only=True
    )
    assert (info.dim, info.depth, info.grid, info.image_size) == (32, 3, (4, 4), size)
    assert info.has_cls == (model.cls_token is not None)
    for level, expected in enumerate(intermediates):
        patches, prefix = expected if info.has_cls else (expected, None)
        torch.testing.assert_close(targets.levels[level], patches, atol=1e-5, rtol=1e-5)
        if prefix is not None:
            torch.testing.assert_close(targets.cls[level], prefix[:, 0], atol=1e-5, rtol=1e-5)
    if info.has_cls:
        matrix = full_attention(model, pixels)
        row = matrix.mean(1)[:, 0, model.num_prefix_tokens :]
        torch.testing.assert_close(targets.cls_attention, row, atol=1e-6, rtol=0)
        assert targets.cls_attention is not None and bool((targets.cls_attention.sum(1) < 1).all())
    else:
        assert not targets.cls and targets.cls_attention is None


def test_another_grid_resamples_the_positions(tmp_path: Path) -> None:
    model = tiny.timm_model("vit_base_patch16_224.dino", 96)
    config = tiny.timm_config("vit_base_patch16_224.dino", tiny.saved(model, tmp_path / "w.safetensors"), image_size=64)
    ours = tiny.ensemble(config, 96).teachers["t"].tower.state_dict()["pos_embed"]
    table = model.pos_embed.detach()
    grid = table[:, 1:].transpose(1, 2).unflatten(2, (6, 6))
    expected = F.interpolate(grid, size=(4, 4), mode="bicubic", align_corners=False, antialias=False)
    assert torch.equal(ours[:, :1], table[:, :1])
    torch.testing.assert_close(ours[:, 1:], expected.flatten(2).transpose(1, 2), atol=1e-6, rtol=0)


def test_clip_l14_positions_equal_the_official_resize(tmp_path: Path) -> None:
    official = golden.load("clip14_pos_resize_dev")
    options = {**tiny.TIMM, "embed_dim": 24, "patch_size": 14}
    model = tiny.timm_model("vit_base_patch16_clip_quickgelu_224", 224, **options)
    model.pos_embed.data[0, 1:] = official["input/patch_positions_16x16"]
    config = tiny.timm_config("vit_base_patch16_clip_quickgelu_224", tiny.saved(model, tmp_path / "w.safetensors"),
                              image_size=196, options=options)  # fmt: skip
    teacher = tiny.ensemble(config, 224).teachers["t"]
    assert teacher.info.grid == (14, 14)
    golden.close(teacher.tower.state_dict()["pos_embed"][0, 1:], official["output/patch_positions_14x14"])


def test_patch_14_meets_a_patch_16_student_at_196_px() -> None:
    config = tiny.timm_config("vit_base_patch14_reg4_dinov2", None, random=True, image_size=196)
    targets = tiny.ensemble(config, 224)(tiny.images(1, 224))["t"]
    assert targets.levels[2].shape == (1, 14 * 14, 32) and targets.cls_attention is not None
    assert targets.cls_attention.shape == (1, 14 * 14)


@torch.no_grad()
def test_rotary_positions_follow_the_grid(tmp_path: Path) -> None:
    """A file trained at 96 px serves at 64 px: the angles are computed for the grid, nothing is resampled."""
    path = tiny.saved(tiny.timm_model("vit_base_patch16_dinov3", 96), tmp_path / "w.safetensors")
    model = tiny.timm_model("vit_base_patch16_dinov3", 64)
    model.load_state_dict(load_file(path))
    images = tiny.images(2, 96)
    ensemble = tiny.ensemble(tiny.timm_config("vit_base_patch16_dinov3", path, image_size=64), 96)
    expected = model.forward_intermediates(
        ensemble.teachers["t"].preprocess(images), output_fmt="NLC", intermediates_only=True
    )
    torch.testing.assert_close(ensemble(images)["t"].levels[2], expected[2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["vit_base_patch16_dinov3", "eva02_base_patch14_224"])
def test_angles_stay_exact_in_low_precision(name: str, tmp_path: Path) -> None:
    size = ROTARY[name]
    path = tiny.saved(tiny.timm_model(name, size), tmp_path / "w.safetensors")
    exact, low = (tiny.ensemble(tiny.timm_config(name, path, precision=p), size) for p in ("fp32", "bf16"))
    assert isinstance(low.teachers["t"].angles, Tensor) and low.teachers["t"].angles.dtype == torch.float32
    targets, near = exact(tiny.images(2, size))["t"], low(tiny.images(2, size))["t"]
    assert targets.cls_attention is not None and near.cls_attention is not None
    for ours, reference in ((near.levels[2], targets.levels[2]), (near.cls_attention, targets.cls_attention)):
        assert 0 < float((ours.float() - reference).norm() / reference.norm()) < 0.04


def test_random_rotary_teacher_draws_from_its_name_alone() -> None:
    before = torch.get_rng_state()
    config = tiny.timm_config("vit_base_patch16_dinov3", None, random=True)
    first, again = tiny.ensemble(config, 64), tiny.ensemble(config, 64)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first(tiny.images(1, 64))["t"].levels[2], again(tiny.images(1, 64))["t"].levels[2])


def test_activation_replaces_the_model_s() -> None:
    exact = tiny.ensemble(tiny.timm_config("vit_base_patch16_clip_224", None, random=True), 32)
    quick = tiny.ensemble(tiny.timm_config("vit_base_patch16_clip_224", None, random=True, activation="quickgelu"), 32)
    named = tiny.ensemble(tiny.timm_config("vit_base_patch16_clip_quickgelu_224", None, random=True), 32)
    images = tiny.images(1, 32)
    outputs = [teacher(images)["t"].levels[2] for teacher in (exact, quick, named)]
    assert torch.equal(outputs[1], outputs[2]) and not torch.equal(outputs[0], outputs[1])


def test_skeleton_of_a_giant_takes_no_memory() -> None:
    teacher = build_skeleton(
        "t", tiny.timm_config("vit_giant_patch14_reg4_dinov2", None, options={}, image_size=196), 224
    )
    assert all(p.is_meta for p in teacher.parameters()) and sum(p.numel() for p in teacher.parameters()) > 1e9
    assert (teacher.info.dim, teacher.info.depth, teacher.info.grid) == (1536, 40, (14, 14))


@pytest.mark.parametrize(
    ("model", "changes", "line"),
    [
        ("vit_bse_patch16_224", {}, "unknown to timm .*did you mean vit_base_patch16_224"),
        ("vit_base_patch16_224.dinoo", {}, "no tag 'dinoo' for vit_base_patch16_224; choose one of .*dino"),
        ("vit_base_patch16_rope_mixed_224", {}, "Eva.* is not a plain .* choose a CLIP, DINO, DINOv2, DINOv3, EVA02"),
        ("deit_base_distilled_patch16_224", {}, "VisionTransformerDistilled.* is not a plain"),
        ("vit_small_r26_s32_224", {}, "is not a plain"),
        ("vit_base_patch16_224", {"options": {"width": 3}}, "timm cannot build .*width"),
        ("vit_base_patch14_dinov2", {}, "image size 64 is not a multiple of the patch 14 .* to 56 or 70"),
        (
            "vit_base_patch16_clip_224.openai",
            {},
            "trained with QuickGELU; use vit_base_patch16_clip_quickgelu_224.openai",
        ),
    ],
)
def test_refusals(model: str, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line) as error:
        tiny.describe(tiny.timm_config(model, None, **changes), 64)
    assert "\n" not in str(error.value) and "teachers.t" in str(error.value)


@pytest.mark.parametrize("option", ["patch_size", "embed_dim", "num_heads"])
@pytest.mark.parametrize("value", [0, -1, [], {"a": 1}, "wide"])
def test_options_that_no_model_can_have_are_one_line(option: str, value: Any) -> None:
    """timm divides by some of them."""
    section = {"library": "timm", "model": "vit_tiny_patch16_224", "random": True, "options": {option: value}}
    with pytest.raises(UserError, match="teachers.a") as caught:
        config = load_recipe("maskalign_tiny", [f"teachers={json.dumps({'a': section})}"])
        build_skeleton("a", config.teachers["a"], 48)
    assert "\n" not in str(caught.value)
