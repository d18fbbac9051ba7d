"""MFF's fusion of encoder levels (Liu et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mimscale.models.vit import Linear


class Fused(NamedTuple):
    """tokens: [B, T, D] in the type of the levels. weights: float32 [N], sum 1, without gradient: for the log."""

    tokens: Tensor
    weights: Tensor


class LevelFusion(nn.Module):
    """Softmax-weighted sum of N levels; each but the last passes through a linear layer of its own first.

    logits: [N, 1, 1, 1], one per level, 1 at the start. A single level is handed through and has none: the softmax over
    it is constant, so no gradient would reach it.
    """

    logits: Tensor | None

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(Linear(width, width) for _ in range(count - 1))
        self.register_parameter("logits", nn.Parameter(torch.ones(count, 1, 1, 1)) if count > 1 else None)

    def forward(self, levels: Sequence[Tensor]) -> Fused:
        """levels: N raw block outputs [B, T, D], shallow to deep. The sum is taken in fp32."""
        *shallow, deepest = levels
        if self.logits is None:
            return Fused(deepest, torch.ones(1, device=deepest.device))
        projected = [projection(x) for projection, x in zip(self.projections, shallow, strict=True)]
        weights = self.logits.float().softmax(dim=0)
        total = weights[-1] * deepest
        for weight, x in zip(weights, projected, strict=False):
            total = total + weight * x
        return Fused(total.to(deepest.dtype), weights.detach().flatten())
