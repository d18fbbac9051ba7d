"""Hugging Face transformers' names: `ViTMAEForPreTraining` whole, and the encoders ViT, ViTMAE, DINOv2 and CLIP.

They split queries, keys and values; everything else is renamed. Encoders are read only; a whole MAE goes both ways.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mimscale.config.run import RunConfig
from mimscale.convert.formats import mae, timm
from mimscale.convert.names import Levels, Mapped, State, renamed
from mimscale.errors import UserError
from mimscale.teachers import huggingface

METHODS: tuple[str, ...] = ("mae",)
WHOLE_MODEL: str | None = "decoder.mask_token"

QKV = ("query", "key", "value")
PREFIXES = (  # theirs, MAE's; the first that fits is replaced
    ("vit.embeddings.cls_token", "cls_token"),
    ("vit.embeddings.position_embeddings", "pos_embed"),
    ("vit.embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("vit.encoder.layer.", "blocks."),
    ("vit.layernorm.", "norm."),
    ("decoder.mask_token", "mask_token"),
    ("decoder.decoder_layers.", "decoder_blocks."),
    ("decoder.decoder_", "decoder_"),
)
INSIDE = (
    (".attention.output.dense.", ".attn.proj."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
)


def recognises(state: Mapping[str, Tensor]) -> bool:
    own = any(name.startswith(("distill_", "student.")) for name in state)  # MaskAlign's hold a teacher of these names
    return not own and any(name.endswith(huggingface.ANCHORS) for name in state)


def encoder(state: Mapping[str, Tensor]) -> State:
    """The student's tensors. Raises UserError where one of them is missing."""
    try:
        named = huggingface.to_timm(state)
    except KeyError as error:
        raise UserError(f"a file with Hugging Face's names lacks the tensor {error}; get it again") from None
    assert named is not None
    return timm.encoder(named)


def from_official(state: Mapping[str, Tensor], levels: Levels | None = None) -> Mapped:
    if WHOLE_MODEL not in state:
        return timm.from_official(encoder(state))
    official: State = {}
    state = huggingface.names_of_files(state)
    for name, tensor in state.items():
        left, query, right = name.partition(f".attention.attention.{QKV[0]}.")
        if query:
            parts = [state[f"{left}.attention.attention.{part}.{right}"] for part in QKV]
            official[renamed(f"{left}.attn.qkv.{right}", PREFIXES, INSIDE)] = torch.cat(parts)
        elif ".attention.attention." not in name:
            official[renamed(name, PREFIXES, INSIDE)] = tensor
    return mae.from_official(official)


def fits(weights: Mapping[str, Tensor]) -> bool:
    return mae.fits(weights)


def to_official(weights: Mapping[str, Tensor], run: RunConfig | None = None) -> Mapped:
    prefixes, inside = ([(ours, theirs) for theirs, ours in pairs] for pairs in (PREFIXES, INSIDE))
    named: State = {}
    for name, tensor in mae.to_official(weights).weights.items():
        left, qkv, right = renamed(name, prefixes, inside).partition(".attn.qkv.")
        if qkv:
            for part, value in zip(QKV, tensor.chunk(3), strict=True):
                named[f"{left}.attention.attention.{part}.{right}"] = value.clone()
        else:
            named[left] = tensor
    return Mapped(named)
