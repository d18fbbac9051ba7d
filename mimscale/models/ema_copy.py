"""A network whose weights are an exponential moving average of another network's, for methods that learn from it.

The moving average of the student that a recipe asks for (`ema:`) is another one: `mimscale/optim/ema.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class EmaCopy(nn.Module):
    """A float32 copy of a network in evaluation mode, without gradients, for methods that learn from their own average.

    Its weights are buffers: ZeRO neither trains nor partitions them, checkpoints keep them, and every rank has them
    whole, which costs 4 bytes per weight. They stay float32 where the method is cast to 16 bit, because a step of the
    average is smaller than what 16 bits resolve.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        for module in self.network.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach().float().clone())

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network returns, on the averaged weights."""
        return self.network(*args, **kwargs)

    @torch.no_grad()
    def update(self, weights: Iterable[tuple[str, Tensor]], decay: float) -> None:
        """average = decay x average + (1 - decay) x weights. weights: by the network's own parameter names."""
        averages = dict(self.network.named_buffers())
        for name, value in weights:
            averages[name].lerp_(value.to(averages[name]), 1 - decay)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EmaCopy:
        """Move to another device, but keep the number format: `fn` is what `to`, `half` and the like do to a tensor."""
        device = fn(torch.empty(0, device=next(self.network.buffers()).device)).device
        super()._apply(lambda tensor: tensor.to(device), recurse)
        return self
