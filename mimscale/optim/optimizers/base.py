"""What an optimiser is to this package: a torch optimiser, its section of a recipe, and the state that it keeps.

An optimiser is one file in this folder that defines one `Optimizer`; it is found by the file's name. Adding one needs
its file and a test, and no edit anywhere else. A recipe chooses it with `optim: {name: NAME, ...}`. Engines and
checkpoints ask the class which tensors there are, so none of them knows a particular optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from mimscale.config.registry import class_in
from mimscale.optim.config import OptimConfig


class Piece(NamedTuple):
    """flat(tensor)[offset : offset + length] holds a part of the parameter `name`, which has so many dimensions."""

    tensor: Tensor
    offset: int
    length: int
    name: str
    dimensions: int


class Optimizer:
    """Base class, never instantiated. A subclass sets all four attributes and `options`.

    TORCH: the optimiser. ZeRO hands it slices of concatenated parameters, so it must work element by element; one that
        does not, such as LARS, overrides `use_pieces`.
    STATES: keys of its state that hold one float32 number per element of a parameter; zeros must be a valid start.
        A checkpoint keeps each under this name, as a kind of fragment.
    COUNTS_STEPS: whether its state has the key "step", the number of steps taken, a 0-dim float32 tensor.
    """

    Config: ClassVar[type[OptimConfig]] = OptimConfig
    TORCH: ClassVar[type[torch.optim.Optimizer]]
    STATES: ClassVar[tuple[str, ...]]
    COUNTS_STEPS: ClassVar[bool]

    @classmethod
    def options(cls, config: Any, *, fused: bool) -> dict[str, Any]:
        """Keyword arguments of TORCH besides the groups and `lr`. config: a `Config`. fused: whether there is a GPU."""
        raise NotImplementedError

    @classmethod
    def create_state(cls, optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor], step: float) -> None:
        """Give each tensor that `optimizer` steps on the state after `step` steps, all other numbers zero.

        Each gets a step counter of its own; a shared one would advance once per tensor in every step.
        """
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        for tensor in tensors:
            state = optimizer.state[tensor]
            state.clear()
            if cls.COUNTS_STEPS:
                device = tensor.device if on_device else torch.device("cpu")
                state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
            for name in cls.STATES:
                state[name] = torch.zeros_like(tensor.data)

    @classmethod
    def use_pieces(
        cls,
        optimizer: torch.optim.Optimizer,
        pieces: Sequence[Piece],
        names: Sequence[str],
        total: Callable[[Tensor], Tensor],
    ) -> None:
        """Told once by an engine whose optimiser steps on other tensors than parameters. Most need nothing of it.

        pieces: of this rank. names: of all parameters, the same on every rank. total: a tensor summed over the ranks
        that hold the pieces of one parameter, collective; the identity where each rank holds all.
        """


def optimizer_class(name: str) -> type[Optimizer]:
    """The Optimizer that the file mimscale/optim/optimizers/<name>.py defines. Raises ValueError."""
    found: type[Optimizer] = class_in("mimscale.optim.optimizers", name, "optim.name")
    return found
