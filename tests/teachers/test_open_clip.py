"""open_clip's image towers: our walk equals theirs, and QuickGELU is never guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from mimscale.errors import UserError
from mimscale.teachers.ensemble import build_skeleton
from mimscale.types import TeacherNeeds
from tests.teachers import tiny


def block_inputs(visual: Any, pixels: Tensor) -> list[Tensor]:
    """What goes into each block and what leaves the last, [B, N, D], by open_clip's own forward."""
    caught: list[Tensor] = []
    blocks = visual.transformer.resblocks
    handles = [b.register_forward_pre_hook(lambda m, a, k: caught.append((a or (k["q_x"],))[0]), with_kwargs=True)
               for b in blocks]  # fmt: skip
    handles.append(blocks[-1].register_forward_hook(lambda m, i, output: caught.append(output)))
    visual(pixels)
    for handle in handles:
        handle.remove()
    return [x if blocks[0].attn.batch_first else x.transpose(0, 1) for x in caught]


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B-16-quickgelu", "ViT-L-14"])
@torch.no_grad()
def test_equals_open_clip(name: str, tmp_path: Path) -> None:
    size = 56 if "14" in name else 64
    model = tiny.open_clip_model(name, size)
    ensemble = tiny.ensemble(tiny.open_clip_config(name, tiny.saved(model, tmp_path / "w.safetensors")), size)
    images = tiny.images(2, size)
    targets = ensemble(images)["t"]
    states = block_inputs(model.visual, ensemble.teachers["t"].preprocess(images))
    for level in range(3):
        tokens = states[level + 1]
        torch.testing.assert_close(targets.levels[level], tokens[:, 1:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(targets.cls[level], tokens[:, 0], atol=1e-5, rtol=1e-5)
    last = model.visual.transformer.resblocks[-1]
    last.attn.batch_first = True
    normed = last.ln_1(states[2])
    _, matrix = last.attn(normed, normed, normed, need_weights=True, average_attn_weights=True)
    torch.testing.assert_close(targets.cls_attention, matrix[:, 0, 1:], atol=1e-6, rtol=0)
    assert ensemble.teachers["t"].info == tiny.describe(tiny.open_clip_config(name, None), size)


@pytest.mark.parametrize(("precision", "limit"), [("bf16", 0.03), ("fp16", 0.004)])
def test_low_precision_is_close(precision: str, limit: float, tmp_path: Path) -> None:
    path = tiny.saved(tiny.open_clip_model("ViT-B-16", 64), tmp_path / "w.safetensors")
    ensembles = [tiny.ensemble(tiny.open_clip_config("ViT-B-16", path, precision=p), 64) for p in ("fp32", precision)]
    exact, low = (ensemble(tiny.images(2, 64))["t"] for ensemble in ensembles)
    assert exact.cls_attention is not None and low.cls_attention is not None
    for ours, reference in ((low.levels[2], exact.levels[2]), (low.cls_attention, exact.cls_attention)):
        assert 0 < float((ours.float() - reference).norm() / reference.norm()) < limit


def test_a_file_of_the_image_tower_alone(tmp_path: Path) -> None:
    model = tiny.open_clip_model("ViT-B-16", 64)
    whole = tiny.saved(model, tmp_path / "whole.safetensors")
    alone = tiny.saved(model.visual, tmp_path / "alone.safetensors")
    images = tiny.images(1, 64)
    outputs = [tiny.ensemble(tiny.open_clip_config("ViT-B-16", path), 64)(images)["t"] for path in (whole, alone)]
    assert torch.equal(outputs[0].levels[2], outputs[1].levels[2])


def test_another_grid_resamples_the_positions(tmp_path: Path) -> None:
    model = tiny.open_clip_model("ViT-B-16", 96)
    config = tiny.open_clip_config("ViT-B-16", tiny.saved(model, tmp_path / "w.safetensors"), image_size=64)
    ours = tiny.ensemble(config, 96).teachers["t"].tower.state_dict()["positional_embedding"]
    table = model.visual.positional_embedding.detach()
    grid = table[1:].T.unflatten(1, (6, 6)).unsqueeze(0)
    expected = F.interpolate(grid, size=(4, 4), mode="bicubic", align_corners=False, antialias=False)
    assert torch.equal(ours[0], table[0])
    torch.testing.assert_close(ours[1:], expected[0].flatten(1).T, atol=1e-6, rtol=0)


def test_the_tag_gives_the_statistics(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({}, path)
    config = tiny.open_clip_config("ViT-L-14-CLIPA", path, pretrained="datacomp1b", activation=None)
    clip = build_skeleton("t", tiny.open_clip_config("ViT-L-14", path), 56)
    clipa = build_skeleton("t", config, 56)
    assert torch.allclose(clipa.scale, torch.ones(1, 3, 1, 1)) and not torch.allclose(clip.scale, clipa.scale)


@pytest.mark.parametrize(
    ("model", "changes", "line"),
    [
        ("ViT-B-61", {}, "unknown to open_clip; did you mean ViT-B-16"),
        ("ViT-B-16-SigLIP", {}, "wraps a timm model; use library: timm, model: vit_base_patch16_siglip_224"),
        ("RN50", {"options": {}}, "ModifiedResNet.* is not open_clip's plain VisionTransformer"),
        ("ViT-B-16", {"activation": None}, "activation is missing"),
        ("ViT-B-16", {"activation": "quickgelu"}, "trained with quickgelu.*use model: ViT-B-16-quickgelu"),
        ("ViT-B-16-quickgelu", {"activation": "gelu"}, "trained with gelu.*use model: ViT-B-16$"),
        ("ViT-B-16", {"pretrained": "openai", "activation": None}, "quickgelu.*use model: ViT-B-16-quickgelu"),
        (
            "ViT-B-16",
            {"pretrained": "laion2b_s34b_b88k", "activation": "quickgelu"},
            "trained with gelu; leave activation",
        ),
        ("ViT-B-16", {"pretrained": "nothing", "activation": None}, "'nothing' is unknown; choose one of openai"),
        ("ViT-B-16", {"options": {"wdith": 3}}, "open_clip cannot build ViT-B-16"),
        ("ViT-L-14", {}, "image size 64 is not a multiple of the patch 14"),
    ],
)
def test_refusals(model: str, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line) as error:
        tiny.describe(tiny.open_clip_config(model, Path("absent"), **changes), 64)
    assert "\n" not in str(error.value) and "teachers.t" in str(error.value)


def test_neither_weights_nor_tag_names_the_tags() -> None:
    with pytest.raises(UserError, match="neither weights nor pretrained; open_clip's tags for ViT-B-16 are openai"):
        tiny.ensemble(tiny.open_clip_config("ViT-B-16", None), 64, TeacherNeeds())
