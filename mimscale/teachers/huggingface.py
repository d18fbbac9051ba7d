"""Convert Hugging Face's parameter names of CLIP vision towers, ViTs, BEiTs and DINOv2 to timm's.

Official MaskAlign checkpoints hold their teacher under these names, and so do the files of Hugging Face's hub. A file
does not record constants: CLIP has LayerNorm eps 1e-5 and QuickGELU; Hugging Face's DINO has eps 1e-12, unlike timm's
(set `norm_eps`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_CLIP_ANCHOR = "embeddings.class_embedding"  # below vision_model., or at the root, as transformers 5 saves the tower
_VIT_ANCHOR = "embeddings.cls_token"
ANCHORS = (_CLIP_ANCHOR, _VIT_ANCHOR)
"""How the name of one tensor of each tower ends that has Hugging Face's names."""

_CLIP_BLOCK = {
    "self_attn.out_proj": "attn.proj",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_VIT_BLOCK = {
    "attention.output.dense": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_DINOV2_BLOCK = {
    "attention.output.dense": "attn.proj",
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_TABLE = "relative_position_bias_table"
_BEIT_OPTIONAL = (
    ("embeddings.position_embeddings", "pos_embed"),
    (f"encoder.relative_position_bias.{_TABLE}", f"rel_pos_bias.{_TABLE}"),
    ("layernorm.weight", "norm.weight"),
    ("layernorm.bias", "norm.bias"),
    ("pooler.layernorm.weight", "fc_norm.weight"),
    ("pooler.layernorm.bias", "fc_norm.bias"),
)
_BEIT_OF_BLOCKS = (
    ("lambda_1", "gamma_1"),
    ("lambda_2", "gamma_2"),
    (f"attention.attention.relative_position_bias.{_TABLE}", f"attn.{_TABLE}"),
)
_LAYER_SCALE = (("layer_scale1.lambda1", "ls1.gamma"), ("layer_scale2.lambda1", "ls2.gamma"))


_OF_FILES = (  # names of the modules of a ViT in transformers 5 -> those in its files, which are transformers 4's
    (re.compile(r"(^|\.)layers\.(?=\d)"), r"\1encoder.layer."),
    (re.compile(r"\.attention\.q_proj\."), ".attention.attention.query."),
    (re.compile(r"\.attention\.k_proj\."), ".attention.attention.key."),
    (re.compile(r"\.attention\.v_proj\."), ".attention.attention.value."),
    (re.compile(r"\.attention\.o_proj\."), ".attention.output.dense."),
    (re.compile(r"(^|\.)shared_position_bias\."), r"\1encoder.relative_position_bias."),
    (re.compile(r"(\.layer\.\d+)\.relative_position_bias\."), r"\1.attention.attention.relative_position_bias."),
)
_OF_FILES_MLP = ((".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense."))  # but for DINOv2


def names_of_files(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ViT's state dict under the names that its files have, where it was saved under its modules' in transformers 5.

    `save_pretrained` writes the names of transformers 4, `torch.save` of a state dict those of the modules.
    """
    if not any(_OF_FILES[1][0].search(name) for name in state):
        return dict(state)
    dinov2 = any(name.endswith(_LAYER_SCALE[0][0]) for name in state)
    out = {}
    for name, tensor in state.items():
        for pattern, replacement in _OF_FILES:
            name = pattern.sub(replacement, name)
        for theirs, files in () if dinov2 else _OF_FILES_MLP:
            name = name.replace(theirs, files)
        out[name] = tensor
    return out


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The same weights under timm's names; None if the names are not Hugging Face's."""
    if any(key.endswith(_CLIP_ANCHOR) for key in state):
        return from_huggingface_clip(state)
    if any(key.endswith(_VIT_ANCHOR) for key in state):
        named = names_of_files(state)
        biased = {part for part in ("query", "key") if any(key.endswith(f".attention.{part}.bias") for key in named)}
        return from_huggingface_beit(named) if biased == {"query"} else from_huggingface_vit(named)
    return None


def from_huggingface_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIPVisionModel, or any model that contains one -> timm's VisionTransformer (pre-norm, no patch bias, no head).

    Raises KeyError if a tensor of the tower is missing.
    """
    state = _below(state, _CLIP_ANCHOR, _CLIP_ANCHOR)
    out = {
        "cls_token": state["embeddings.class_embedding"].view(1, 1, -1),
        "pos_embed": state["embeddings.position_embedding.weight"].unsqueeze(0),
        "patch_embed.proj.weight": state["embeddings.patch_embedding.weight"],
    }
    for theirs, ours in (("pre_layrnorm", "norm_pre"), ("post_layernorm", "norm")):  # their spelling
        out |= {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    attention = [f"self_attn.{part}_proj" for part in "qkv"]
    return out | _blocks(state, "encoder.layers", attention, _CLIP_BLOCK)


def from_huggingface_vit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ViTModel (supervised, DINO, MAE) or Dinov2Model, or any model that contains one -> timm's VisionTransformer.

    Without head; DINOv2's mask token is left out, and its SwiGLU (giant) is not known.

    Raises KeyError if a tensor of the tower is missing.
    """
    state = _below(state, _VIT_ANCHOR, _VIT_ANCHOR)
    out = {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": state["embeddings.position_embeddings"],
    }
    for theirs, ours in (("embeddings.patch_embeddings.projection", "patch_embed.proj"), ("layernorm", "norm")):
        out |= {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    if "embeddings.register_tokens" in state:
        out["reg_token"] = state["embeddings.register_tokens"]
    attention = [f"attention.attention.{part}" for part in ("query", "key", "value")]
    dinov2 = any(key.endswith(_LAYER_SCALE[0][0]) for key in state)
    out |= _blocks(state, "encoder.layer", attention, _DINOV2_BLOCK if dinov2 else _VIT_BLOCK)
    for key, tensor in state.items():
        for theirs, ours in _LAYER_SCALE:
            if key.startswith("encoder.layer.") and key.endswith(theirs):
                out[f"blocks.{key.split('.')[2]}.{ours}"] = tensor
    return out


def from_huggingface_beit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """BeitModel, or any model that contains one -> timm's Beit. Its keys have no bias.

    `norm` is there where the model normalises all tokens, `fc_norm` where it normalises their mean. Without head; the
    mask token is left out.

    Raises KeyError if a tensor of the tower is missing.
    """
    state = _below(state, _VIT_ANCHOR, _VIT_ANCHOR)
    out = {"cls_token": state["embeddings.cls_token"]}
    out |= {f"patch_embed.proj.{k}": state[f"embeddings.patch_embeddings.projection.{k}"] for k in ("weight", "bias")}
    for theirs, ours in _BEIT_OPTIONAL:
        if theirs in state:
            out[ours] = state[theirs]
    attention = [f"attention.attention.{part}" for part in ("query", "key", "value")]
    zeros = {
        key.replace(".query.", ".key."): torch.zeros_like(tensor)
        for key, tensor in state.items()
        if key.endswith(f"{attention[0]}.bias")
    }
    out |= _blocks({**state, **zeros}, "encoder.layer", attention, _VIT_BLOCK)
    for key in [key for key in out if key.endswith(".attn.qkv.bias")]:
        place = key.removesuffix("qkv.bias")
        out[f"{place}q_bias"], _, out[f"{place}v_bias"] = (part.clone() for part in out.pop(key).chunk(3))
    for key, tensor in state.items():
        for theirs, ours in _BEIT_OF_BLOCKS:
            if key.startswith("encoder.layer.") and key.endswith(theirs):
                out[f"blocks.{key.split('.')[2]}.{ours}"] = tensor
    return out


def _below(state: Mapping[str, Tensor], anchor: str, kept: str) -> dict[str, Tensor]:
    """The tensors of the module that owns `anchor`, without the module's prefix."""
    found = next(key for key in state if key.endswith(anchor))
    prefix = found.removesuffix(kept)
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def _blocks(
    state: Mapping[str, Tensor], root: str, attention: list[str], names: Mapping[str, str]
) -> dict[str, Tensor]:
    found = (re.match(rf"{re.escape(root)}\.(\d+)\.", key) for key in state)
    depth = 1 + max(int(match[1]) for match in found if match)
    out: dict[str, Tensor] = {}
    for index in range(depth):
        for kind in ("weight", "bias"):
            here, there = f"{root}.{index}", f"blocks.{index}"
            out[f"{there}.attn.qkv.{kind}"] = torch.cat([state[f"{here}.{part}.{kind}"] for part in attention])
            out |= {f"{there}.{ours}.{kind}": state[f"{here}.{theirs}.{kind}"] for theirs, ours in names.items()}
    return out
