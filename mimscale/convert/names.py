"""State dicts and the renaming of their tensors: what every name format is made of. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]
Pairs = Sequence[tuple[str, str]]
Levels = Mapping[str, Sequence[int]]
"""Teacher -> its levels that the loss reads."""


@dataclass(frozen=True)
class Mapped:
    """Tensors under their new names, and one line for each thing that was left out or filled in."""

    weights: State
    notes: tuple[str, ...] = ()


def parts_of(weights: Mapping[str, Tensor]) -> set[str]:
    """The first components of the names: the modules of a Method (student, decoder, ...) that a state dict has."""
    return {name.partition(".")[0] for name in weights}


def below(prefix: str, weights: Mapping[str, Tensor]) -> State:
    """The tensors whose names start with a prefix, under the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def renamed(name: str, prefixes: Pairs, inside: Pairs) -> str:
    """Replace the first prefix (old, new) that fits, then every (old, new) of `inside` anywhere in the name."""
    old, new = next((pair for pair in prefixes if name.startswith(pair[0])), ("", ""))
    name = new + name.removeprefix(old)
    for old, new in inside:
        name = name.replace(old, new)
    return name


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts have the same names, shapes and bits, NaN included."""

    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().flatten().view(torch.uint8)

    return ours.keys() == theirs.keys() and all(
        ours[name].shape == tensor.shape and torch.equal(bits(ours[name]), bits(tensor))
        for name, tensor in theirs.items()
    )
