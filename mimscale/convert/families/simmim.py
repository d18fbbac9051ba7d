"""SimMIM's names for its ViT: `encoder.` has those of timm's Beit, `decoder.0` is a 1 x 1 convolution.

AMT on SimMIM has them too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mimscale.config import RunConfig
from mimscale.convert.names import Levels, Mapped, State, below, parts_of
from mimscale.models.relpos import CLS_ROWS, relative_index

METHODS: tuple[str, ...] = ("simmim",)
WHOLE = "encoder.mask_token"
REL_POS_TABLE = "rel_pos_bias.relative_position_bias_table"
REL_POS_INDEX = "rel_pos_bias.relative_position_index"


def recognises(state: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("encoder.") for name in state)


def encoder(state: Mapping[str, Tensor]) -> State:
    kept = below("encoder.", state)
    return {name: tensor for name, tensor in kept.items() if name not in ("mask_token", REL_POS_INDEX)}


def from_official(state: Mapping[str, Tensor], levels: Levels | None = None) -> Mapped:
    """The index into the bias table is left out: it follows from the grid."""
    weights = {f"student.{n}": tensor for n, tensor in below("encoder.", state).items() if n != REL_POS_INDEX}
    for name, tensor in below("decoder.0.", state).items():
        weights[f"head.{name}"] = tensor.flatten(1) if tensor.dim() > 1 else tensor
    return Mapped(weights)


def fits(weights: Mapping[str, Tensor]) -> bool:
    return parts_of(weights) == {"student", "head"} and "student.mask_token" in weights


def to_official(weights: Mapping[str, Tensor], run: RunConfig | None = None) -> Mapped:
    state = {f"encoder.{name}": tensor for name, tensor in below("student.", weights).items()}
    if f"encoder.{REL_POS_TABLE}" in state:
        side = grid_side(state[f"encoder.{REL_POS_TABLE}"])
        state[f"encoder.{REL_POS_INDEX}"] = relative_index((side, side), torch.device("cpu"))
    state["decoder.0.weight"] = weights["head.weight"][:, :, None, None]
    return Mapped({**state, "decoder.0.bias": weights["head.bias"]})


def grid_side(table: Tensor) -> int:
    """Rows of the square grid that a table of relative positions is for."""
    return (math.isqrt(len(table) - CLS_ROWS) + 1) // 2
