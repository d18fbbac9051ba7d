"""Hugging Face transformers' names: `ViTMAEForPreTraining` whole, and the encoders ViT, ViTMAE, BEiT, DINOv2 and CLIP.

They split queries, keys and values; everything else is renamed. DINOv2 and CLIP are read only. Files keep the names of
transformers 4, which both 4 and 5 load.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mimscale.config.run import RunConfig
from mimscale.convert.formats import mae, timm
from mimscale.convert.names import Levels, Mapped, Pairs, State, renamed
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

OF_ENCODERS = (  # timm's, theirs
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("rel_pos_bias.", "encoder.relative_position_bias."),
    ("blocks.", "encoder.layer."),
    ("norm.", "layernorm."),
    ("fc_norm.", "pooler.layernorm."),
)
INSIDE_BLOCKS = (
    *((ours, theirs) for theirs, ours in INSIDE),
    (".attn.q_bias", ".attention.attention.query.bias"),
    (".attn.v_bias", ".attention.attention.value.bias"),
    (".attn.relative_position_bias_table", ".attention.attention.relative_position_bias.relative_position_bias_table"),
    (".gamma_", ".lambda_"),
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
    return Mapped(_split(mae.to_official(weights).weights, prefixes, inside))


def named_encoder(encoder: Mapping[str, Tensor], root: str = "") -> State:
    """An encoder with timm's names, and `fc_norm`, under those of ViTModel or BeitModel.

    root: of the model that contains it, such as `vit.`. BEiT's keys have no bias, so no name for it is made up.
    """
    return {f"{root}{name}": tensor for name, tensor in _split(encoder, OF_ENCODERS, INSIDE_BLOCKS).items()}


def _split(weights: Mapping[str, Tensor], prefixes: Pairs, inside: Pairs) -> State:
    """The tensors under new names, with queries, keys and values apart."""
    named: State = {}
    for name, tensor in weights.items():
        left, qkv, right = renamed(name, prefixes, inside).partition(".attn.qkv.")
        if qkv:
            for part, value in zip(QKV, tensor.chunk(3), strict=True):
                named[f"{left}.attention.attention.{part}.{right}"] = value.clone()
        else:
            named[left] = tensor
    return named
