"""Names of a fine-tuned classifier, in the code of MAE, ConvMAE and SimMIM and in timm: encoder, `fc_norm`, `head`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mimscale.config.run import RunConfig
from mimscale.convert.formats.timm import HEAD, with_index, without_index
from mimscale.convert.names import Levels, Mapped, State, parts_of

METHODS: tuple[str, ...] = ("finetune",)
WHOLE_MODEL: str | None = "head.weight"


def recognises(state: Mapping[str, Tensor]) -> bool:
    return "head.weight" in state and not any(name.startswith("student.") for name in state)


def encoder(state: Mapping[str, Tensor]) -> State:
    return {name: tensor for name, tensor in without_index(state).items() if not name.startswith(HEAD)}


def from_official(state: Mapping[str, Tensor], levels: Levels | None = None) -> Mapped:
    kept = without_index(state)
    return Mapped({n if n.startswith(HEAD) else f"student.{n}": tensor for n, tensor in kept.items()})


def fits(weights: Mapping[str, Tensor]) -> bool:
    return parts_of(weights) - {"fc_norm"} == {"student", "head"} and "student.mask_token" not in weights


def to_official(weights: Mapping[str, Tensor], run: RunConfig | None = None) -> Mapped:
    return Mapped(with_index({name.removeprefix("student."): tensor for name, tensor in weights.items()}))
