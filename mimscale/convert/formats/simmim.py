"""SimMIM's names for its ViT: below `encoder.` those of timm's Beit, and `decoder.0`, a 1 x 1 convolution.

AMT on SimMIM has them too.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mimscale.config.run import RunConfig
from mimscale.convert.formats.timm import with_index, without_index
from mimscale.convert.names import Levels, Mapped, State, below, parts_of

METHODS: tuple[str, ...] = ("simmim",)
WHOLE_MODEL: str | None = "encoder.mask_token"


def recognises(state: Mapping[str, Tensor]) -> bool:
    return "encoder.patch_embed.proj.weight" in state


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
