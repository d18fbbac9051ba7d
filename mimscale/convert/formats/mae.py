"""MAE's names: the encoder as timm has it, and beside it `mask_token` and `decoder_...`. AMT on MAE has them too."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mimscale.config.run import RunConfig
from mimscale.convert.formats import timm
from mimscale.convert.names import Levels, Mapped, parts_of

METHODS: tuple[str, ...] = ("mae",)
WHOLE_MODEL: str | None = "mask_token"

encoder = timm.encoder


def recognises(state: Mapping[str, Tensor]) -> bool:
    own = any(name.startswith(("mask_token", "decoder_")) for name in state)
    other = any(name.startswith(("distill_", "head.", "backbone.", "encoder.", "student.")) for name in state)
    return "patch_embed.proj.weight" in state and own and not other


def from_official(state: Mapping[str, Tensor], levels: Levels | None = None) -> Mapped:
    def ours(name: str) -> str:
        if name == "mask_token":
            return "decoder.mask_token"
        return f"decoder.{name.removeprefix('decoder_')}" if name.startswith("decoder_") else f"student.{name}"

    return Mapped({ours(name): tensor for name, tensor in state.items()})


def fits(weights: Mapping[str, Tensor]) -> bool:
    return parts_of(weights) == {"student", "decoder"} and "student.patch_embed.proj.weight" in weights


def to_official(weights: Mapping[str, Tensor], run: RunConfig | None = None) -> Mapped:
    def official(name: str) -> str:
        part, _, rest = name.partition(".")
        return rest if part == "student" or rest == "mask_token" else f"decoder_{rest}"

    return Mapped({official(name): tensor for name, tensor in weights.items()})
