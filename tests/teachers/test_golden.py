"""Teachers of the official MaskAlign program (Hugging Face CLIP and DINO), their weights run by our adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mimscale.teachers.ensemble import TeacherEnsemble
from mimscale.teachers.huggingface import from_huggingface_clip
from mimscale.types import Targets, TeacherNeeds
from tests import golden
from tests.teachers import tiny

LIMIT = 1e-5  # absolute, float32; 2.4e-6 was measured
CASES = [f"maskalign_{case}_dev" for case in ("default", "sum_mlp", "clip14", "dino_attn", "simple_random")]
CLIP_CASES = [case for case in CASES if "dino" not in case]
TO_OPEN_CLIP = {
    "blocks.": "transformer.resblocks.",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.qkv.": "attn.in_proj_",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "norm_pre": "ln_pre",
    "patch_embed.proj": "conv1",
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
}


def timm_ensemble(g: golden.Golden, weights: dict[str, Tensor], folder: Path) -> TeacherEnsemble:
    """The golden's teacher as a custom-size timm model that reads the official names."""
    c = {"teacher_depth": g.config.get("depth"), "teacher_patch": 16, "teacher_mlp": 2 * g.config["teacher_dim"]}
    c |= g.config
    path = folder / "w.safetensors"
    save_file(weights, path)
    dino = c.get("teacher") == "dino"
    options = {
        "embed_dim": c["teacher_dim"],
        "depth": c["teacher_depth"],
        "num_heads": c["teacher_heads"],
        "mlp_ratio": c["teacher_mlp"] / c["teacher_dim"],
        "patch_size": c["teacher_patch"],
    }
    config = tiny.timm_config(
        "vit_base_patch16_224.dino" if dino else "vit_base_patch16_clip_quickgelu_224",
        path,
        options=options,
        norm_eps=1e-12 if dino else None,  # CLIP's 1e-5 is the model's own
        image_size=196 if c["teacher_patch"] == 14 else None,
    )
    return tiny.ensemble(config, c["img"], TeacherNeeds(tuple(range(c["teacher_depth"])), cls_attention=True))


def check(targets: Targets, g: golden.Golden) -> None:
    hidden = g["teacher/hidden_states"][1:]  # the first is what enters block 0
    assert sorted(targets.levels) == list(range(len(hidden)))
    for level, expected in enumerate(hidden):
        golden.close(targets.levels[level], expected[:, 1:], LIMIT)
        golden.close(targets.cls[level], expected[:, 0], LIMIT)
    assert targets.cls_attention is not None
    golden.close(targets.cls_attention, g["teacher/cls_attention"], 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_timm_equals_official(case: str, tmp_path: Path) -> None:
    g = golden.load(case)
    ensemble = timm_ensemble(g, g.part("state"), tmp_path)
    images = g["input/images"]
    if "teacher/pixel_values" in g.tensors:
        golden.close(ensemble.teachers["t"].preprocess(images), g["teacher/pixel_values"], 1e-6)
    check(ensemble(images)["t"], g)


@pytest.mark.parametrize("case", CLIP_CASES)
def test_open_clip_equals_official(case: str, tmp_path: Path) -> None:
    g = golden.load(case)
    c = g.config
    state: dict[str, Tensor] = {}
    for key, tensor in from_huggingface_clip(g.part("state")).items():
        for ours, theirs in TO_OPEN_CLIP.items():
            key = key.replace(ours, theirs)
        reshaped = {"class_embedding": tensor.flatten(), "positional_embedding": tensor.squeeze(0)}
        state[f"visual.{key.replace('norm.', 'ln_post.')}"] = reshaped.get(key, tensor).contiguous()
    save_file(state, tmp_path / "w.safetensors")
    options: dict[str, Any] = {
        "width": c["teacher_dim"],
        "layers": c["teacher_depth"],
        "head_width": c["teacher_dim"] // c["teacher_heads"],
        "mlp_ratio": c["teacher_mlp"] / c["teacher_dim"],
        "patch_size": c["teacher_patch"],
    }
    config = tiny.open_clip_config("ViT-B-16-quickgelu", tmp_path / "w.safetensors", options=options,
                                   image_size=196 if c["teacher_patch"] == 14 else None)  # fmt: skip
    needs = TeacherNeeds(tuple(range(c["teacher_depth"])), cls_attention=True)
    check(tiny.ensemble(config, c["img"], needs)(g["input/images"])["t"], g)


def test_kept_patches_of_official_training_follow_from_our_attention(tmp_path: Path) -> None:
    g = golden.load("maskalign_train_dev")
    ensemble = timm_ensemble(g, g.part("state0"), tmp_path)
    for step in range(g.config["steps"]):
        importance = ensemble(g[f"step{step}/images"])["t"].cls_attention
        ids = g[f"step{step}/ids_keep"]
        assert importance is not None
        drawn = (importance / g[f"step{step}/exponential_noise"]).topk(ids.shape[1]).indices
        assert torch.equal(drawn, ids)


def test_dino_at_timm_s_own_eps_is_off(tmp_path: Path) -> None:
    """The constant matters: without norm_eps the comparison above fails."""
    g = golden.load("maskalign_dino_attn_dev")
    ensemble = timm_ensemble(g, g.part("state"), tmp_path)
    for module in ensemble.teachers["t"].modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    with pytest.raises(AssertionError):
        check(ensemble(g["input/images"])["t"], g)
