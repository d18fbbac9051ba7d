"""Frozen modules inside a method: their weights are buffers, so no engine trains, splits or averages them."""

from __future__ import annotations

from torch import nn


def freeze(module: nn.Module) -> None:
    """Turn every parameter into a buffer of the same name, in place: the state dict keeps its names and values.

    Checkpoints hold buffers, so a frozen encoder travels with the head that was trained on it.
    """
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None:
                del owner._parameters[name]
                owner.register_buffer(name, parameter.detach())
