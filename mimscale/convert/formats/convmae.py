"""ConvMAE's names: MAE's, with the convolution stages and the two fusion convolutions in the encoder."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mimscale.convert.formats import mae
from mimscale.convert.names import State, parts_of

METHODS: tuple[str, ...] = ("convmae",)
WHOLE_MODEL: str | None = "stage1_output_decode."
ENCODER = ("cls_token", "pos_embed", "patch_embed", "blocks", "stage1_", "stage2_", "norm.")

from_official, to_official = mae.from_official, mae.to_official


def recognises(state: Mapping[str, Tensor]) -> bool:
    return "patch_embed1.proj.weight" in state and "head.weight" not in state


def encoder(state: Mapping[str, Tensor]) -> State:
    return {name: tensor for name, tensor in state.items() if name.startswith(ENCODER)}


def fits(weights: Mapping[str, Tensor]) -> bool:
    return parts_of(weights) == {"student", "decoder"} and "student.patch_embed1.proj.weight" in weights
