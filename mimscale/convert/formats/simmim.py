"""SimMIM's names for its ViT: `encoder.` has those of timm's Beit, `decoder.0` is a 1 x 1 convolution.

AMT on SimMIM has them too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mimscale.config.run import RunConfig
from mimscale.convert.names import Levels, Mapped, State, below, parts_of
from mimscale.models.rel_pos_bias import CLS_ROWS, relative_index

METHODS: tuple[str, ...] = ("simmim",)
WHOLE = "encoder.mask_token"
TABLE, INDEX = "relative_position_bias_table", "relative_position_index"
REL_POS_TABLE = f"rel_pos_bias.{TABLE}"
"""Of all blocks together; in fine-tuning each has its own, blocks.0.attn. and so on."""


def recognises(state: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("encoder.") for name in state)


def encoder(state: Mapping[str, Tensor]) -> State:
    kept = below("encoder.", state)
    return {name: tensor for name, tensor in without_index(kept).items() if name != "mask_token"}


def from_official(state: Mapping[str, Tensor], levels: Levels | None = None) -> Mapped:
    weights = {f"student.{n}": tensor for n, tensor in without_index(below("encoder.", state)).items()}
    for name, tensor in below("decoder.0.", state).items():
        weights[f"head.{name}"] = tensor.flatten(1) if tensor.dim() > 1 else tensor
    return Mapped(weights)


def fits(weights: Mapping[str, Tensor]) -> bool:
    return parts_of(weights) == {"student", "head"} and "student.mask_token" in weights


def to_official(weights: Mapping[str, Tensor], run: RunConfig | None = None) -> Mapped:
    state = {f"encoder.{name}": tensor for name, tensor in with_index(below("student.", weights)).items()}
    state["decoder.0.weight"] = weights["head.weight"][:, :, None, None]
    return Mapped({**state, "decoder.0.bias": weights["head.bias"]})


def grid_side(table: Tensor) -> int:
    """Rows of the square grid that a table of relative positions is for."""
    return (math.isqrt(len(table) - CLS_ROWS) + 1) // 2


def relative_table(encoder: Mapping[str, Tensor]) -> Tensor | None:
    """The table of relative positions of an encoder, or that of its first block; None where positions are absolute."""
    return next((tensor for name, tensor in encoder.items() if name.endswith(TABLE)), None)


def without_index(state: Mapping[str, Tensor]) -> State:
    """The index into each bias table is left out: it follows from the grid."""
    return {name: tensor for name, tensor in state.items() if not name.endswith(INDEX)}


def with_index(state: Mapping[str, Tensor]) -> State:
    """And filled in where the official programs store it."""
    indices = {}
    for name, tensor in state.items():
        if name.endswith(TABLE):
            side = grid_side(tensor)
            index = relative_index((side, side), torch.device("cpu"))
            indices[name.replace(TABLE, INDEX)] = index.clone()  # a file may not hold one tensor under two names
    return {**state, **indices}
