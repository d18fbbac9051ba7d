"""timm's names of an encoder, and the `timm.create_model` call that loads it.

A VisionTransformer has the names of MAE's encoder, a Beit those of SimMIM's; our students have them too. timm publishes
MAE's and BEiT's encoders under them. A fine-tuned classifier has `fc_norm` and `head` beside them (finetune.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mimscale.config.run import RunConfig
from mimscale.convert.names import Levels, Mapped, State, below, parts_of
from mimscale.models.beit import Beit
from mimscale.models.config import STUDENT_SIZES
from mimscale.models.convvit import ConvViT
from mimscale.models.rel_pos_bias import CLS_ROWS, relative_index
from mimscale.models.vit import ViT

METHODS: tuple[str, ...] = ()
WHOLE_MODEL: str | None = None
ENCODER = ("cls_token", "pos_embed", "rel_pos_bias.", "patch_embed.", "blocks.", "norm.")
HEAD = ("fc_norm.", "head.")
OTHER_FORMATS = ("mask_token", "decoder_", "distill_", "head.", "backbone.", "encoder.", "student.")

TABLE, INDEX = "relative_position_bias_table", "relative_position_index"
SHARED_TABLE = f"rel_pos_bias.{TABLE}"
"""Of all blocks together, in pre-training; in fine-tuning each block has its own, blocks.0.attn. and so on."""

NAMED_SIZE, NAMED_PATCH = 224, 16  # what timm's model names stand for; H is named with patch 14
HUGE_PATCH = 14


# ------------------------------------------------------------------------------------------------------------- names


def recognises(state: Mapping[str, Tensor]) -> bool:
    return "patch_embed.proj.weight" in state and not any(name.startswith(OTHER_FORMATS) for name in state)


def encoder(state: Mapping[str, Tensor]) -> State:
    return {name: tensor for name, tensor in without_index(state).items() if name.startswith(ENCODER)}


def from_official(state: Mapping[str, Tensor], levels: Levels | None = None) -> Mapped:
    return Mapped({f"student.{name}": tensor for name, tensor in without_index(state).items()})


def fits(weights: Mapping[str, Tensor]) -> bool:
    return parts_of(weights) == {"student"} and "student.patch_embed.proj.weight" in weights


def to_official(weights: Mapping[str, Tensor], run: RunConfig | None = None) -> Mapped:
    return Mapped(with_last_norm(with_index(below("student.", weights))))


def with_last_norm(encoder: Mapping[str, Tensor]) -> State:
    """The encoder, with a last norm of weight 1 and bias 0 where its method trains none: timm's networks have one."""
    width = encoder["cls_token"].shape[-1]
    return {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width), **encoder}


def with_head(encoder: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> State:
    """A classifier: the encoder, and `fc_norm` and `head` out of the weights of a fine-tuned method."""
    return {**encoder, **{name: tensor for name, tensor in weights.items() if name.startswith(HEAD)}}


# ------------------------------------------------------------------------------------------------ relative positions


def grid_side(table: Tensor) -> int:
    """Rows of the square grid that a table of relative positions [(2 side - 1)^2 + 3, heads] is for."""
    return (math.isqrt(len(table) - CLS_ROWS) + 1) // 2


def relative_table(encoder: Mapping[str, Tensor]) -> Tensor | None:
    """The shared table of relative positions, or that of the first block; None where positions are absolute."""
    return next((tensor for name, tensor in encoder.items() if name.endswith(TABLE)), None)


def without_index(state: Mapping[str, Tensor]) -> State:
    """The state dict without the index into each table of relative positions, which follows from the grid."""
    return {name: tensor for name, tensor in state.items() if not name.endswith(INDEX)}


def with_index(state: Mapping[str, Tensor]) -> State:
    """The state dict with the index into each table of relative positions, as the official programs store it."""
    indices = {}
    for name, tensor in state.items():
        if name.endswith(TABLE):
            side = grid_side(tensor)
            index = relative_index((side, side), torch.device("cpu"))
            indices[name.replace(TABLE, INDEX)] = index.clone()  # a file may not hold one tensor under two names
    return {**state, **indices}


# --------------------------------------------------------------------------------------------------------- the models


def create_call(vit: ViT | Beit | ConvViT, weights: Mapping[str, Tensor] | None = None) -> tuple[str, dict[str, Any]]:
    """Name and options of `timm.create_model` for a student of this shape.

    weights: of a classifier, whose head decides the number of classes and the pooling.
    """
    student, size = vit.config, vit.grid[0] * vit.config.patch
    shape = (student.width, student.depth, student.heads)
    named = next((name for name, sizes in STUDENT_SIZES.items() if sizes == shape), None)
    kind = "beit" if isinstance(vit, Beit) else "vit"
    known = ("base", "large") if kind == "beit" else tuple(STUDENT_SIZES)
    known_name = named if named in known else "base"
    patch = HUGE_PATCH if known_name == "huge" else NAMED_PATCH
    options: dict[str, Any] = {"num_classes": 0}
    if named != known_name:
        options |= {"embed_dim": student.width, "depth": student.depth, "num_heads": student.heads}
    for name, value, usual in (
        ("img_size", size, NAMED_SIZE),
        ("patch_size", student.patch, patch),
        ("mlp_ratio", student.mlp_ratio, 4.0),
    ):
        if value != usual:
            options[name] = value
    if isinstance(vit, Beit):
        options |= _beit_options(vit)
    if weights is not None and "head.weight" in weights:
        pool = "avg" if "fc_norm.weight" in weights else "token"
        options |= {"num_classes": len(weights["head.weight"]), "global_pool": pool}
    return f"{kind}_{known_name}_patch{patch}_{NAMED_SIZE}", options


def _beit_options(vit: Beit) -> dict[str, Any]:
    """The kind of positions. global_pool = token: with the mean, timm's Beit has no last norm of this name."""
    return {
        "use_abs_pos_emb": vit.positions == "absolute",
        "use_rel_pos_bias": vit.positions == "per_block",
        "use_shared_rel_pos_bias": vit.positions == "relative",
        "init_values": vit.layer_scale or 0.0,  # create_model drops a None
        "global_pool": "token",
    }


def create_model(vit: ViT | Beit | ConvViT, weights: Mapping[str, Tensor] | None = None, **more: Any) -> Any:
    """timm's network of `create_call`, in eval mode. more: further arguments of `timm.create_model`."""
    import timm

    name, options = create_call(vit, weights)
    return timm.create_model(name, **options, **more).eval()


def with_stored_index(vit: ViT | Beit | ConvViT, state: Mapping[str, Tensor]) -> State:
    """The state dict with the index into BEiT's tables, where the installed version of timm stores it."""
    if not isinstance(vit, Beit):
        return dict(state)
    return {**{n: t for n, t in create_model(vit).state_dict().items() if n.endswith(INDEX)}, **state}
