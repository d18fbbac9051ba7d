"""Weights by name, and how names are changed: what every family of checkpoints has in common. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]
Pairs = Sequence[tuple[str, str]]
Levels = Mapping[str, Sequence[int]]
"""Teacher -> those of its levels that a loss reads."""


@dataclass(frozen=True)
class Mapped:
    """Weights under their new names, and one line for each thing that was left out or filled in."""

    weights: State
    notes: tuple[str, ...] = ()


def parts_of(weights: Mapping[str, Tensor]) -> set[str]:
    """Attributes of a Method that a state dict of ours has tensors of: student, decoder, ..."""
    return {name.partition(".")[0] for name in weights}


def below(prefix: str, weights: Mapping[str, Tensor]) -> State:
    """What stands below a prefix, under the rest of its name."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def renamed(name: str, prefixes: Pairs, inside: Pairs) -> str:
    """The first prefix that fits is replaced, then everything in `inside`."""
    old, new = next((pair for pair in prefixes if name.startswith(pair[0])), ("", ""))
    name = new + name.removeprefix(old)
    for old, new in inside:
        name = name.replace(old, new)
    return name


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether two sets of weights are equal to the bit, NaN included."""

    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().flatten().view(torch.uint8)

    return ours.keys() == theirs.keys() and all(
        ours[name].shape == tensor.shape and torch.equal(bits(ours[name]), bits(tensor))
        for name, tensor in theirs.items()
    )
