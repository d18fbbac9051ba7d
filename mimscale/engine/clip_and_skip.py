"""Clipping and the skip of non-finite steps for any torch optimiser, where DeepSpeed does neither: stage 0, fp32."""

from __future__ import annotations

import math
from typing import Any

import torch


class ClipAndSkip(torch.optim.Optimizer):
    """Mixin: clips, and leaves the weights alone when the gradients are not finite.

    The gradients are all-reduced by then, so every rank decides alike. DeepSpeed reads `overflow` after each step and
    counts the skip. Costs one host sync.
    clip: largest global L2 norm of the gradients, 0 = off. norm: that of the last step, before clipping.
    """

    overflow = False
    norm = math.nan
    clip = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
        self.overflow = not math.isfinite(self.norm)
        if self.overflow:
            return None
        if 0 < self.clip < self.norm:
            torch._foreach_mul_(gradients, self.clip / (self.norm + 1e-6))
        return super().step(closure)


def guarded(optimizer: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The optimiser's class with the mixin in front."""
    return type(f"Guarded{optimizer.__name__}", (ClipAndSkip, optimizer), {})
