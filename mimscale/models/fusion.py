"""Fusion of several encoder levels into one: a sum, or MFF's weighted sum of projections (Liu et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import model_validator
from torch import Tensor, nn

from mimscale.config.base import Strict
from mimscale.errors import UserError
from mimscale.models.vit import Linear


class FusionConfig(Strict):
    """kind: none, a plain sum, or MFF's projections and softmax weights. levels: the 0-based blocks whose outputs are
    fused, ascending; ConvMAE's convolution stages, if there are any, are one more level before them.
    """

    kind: Literal["none", "sum", "mff"] = "none"
    levels: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _of_something(self) -> FusionConfig:
        if self.kind != "none" and not self.levels:
            raise ValueError(f"kind = {self.kind} has nothing to fuse; name some levels, or set kind = none")
        if self.kind == "none" and self.levels:
            raise ValueError(f"levels = {list(self.levels)} with kind = none are not used; set kind = sum or mff")
        return self

    @property
    def replaces_last_block(self) -> bool:
        """Whether only the fusion reads the last block."""
        return True


def check_fusion(config: FusionConfig, depth: int) -> None:
    """Refuse levels that `depth` blocks do not have, and blocks whose output is not used. Raises UserError."""
    if config.kind == "none":
        return
    levels, last = config.levels, depth - 1
    rising = list(levels) == sorted({level for level in levels if 0 <= level <= last})
    if config.replaces_last_block and (not rising or levels[-1] != last):
        raise UserError(
            f"method.fusion.levels = {list(levels)} must be ascending, from 0 or more to {last}, the student's last "
            "block: blocks above the last level would get no gradient"
        )
    if not rising:
        raise UserError(f"method.fusion.levels = {list(levels)} must be ascending and lie in 0 to {last}")


def make_fusion(config: FusionConfig, width: int, stages: bool = False) -> LevelFusion | LevelSum | None:
    """The module of `config`, None for none. stages: one more level comes before those of `config`."""
    if config.kind == "none":
        return None
    return LevelFusion(width, len(config.levels) + stages) if config.kind == "mff" else LevelSum()


class Fused(NamedTuple):
    """tokens: [B, T, D] in the dtype of the levels. weights: float32 [N], sum 1, without gradient, for the log; empty
    if the levels have no weights.
    """

    tokens: Tensor
    weights: Tensor


class LevelSum(nn.Module):
    """The sum of N levels [B, T, D]."""

    def forward(self, levels: Sequence[Tensor]) -> Fused:
        return Fused(torch.stack(list(levels)).sum(dim=0), torch.empty(0))


class LevelFusion(nn.Module):
    """Softmax-weighted sum of N levels; each but the last first passes through its own linear layer.

    logits: [N, 1, 1, 1], initially 1. None for a single level, which is returned unchanged: its softmax is constant, so
    its logit would get no gradient.
    """

    logits: Tensor | None

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(Linear(width, width) for _ in range(count - 1))
        self.register_parameter("logits", nn.Parameter(torch.ones(count, 1, 1, 1)) if count > 1 else None)

    def forward(self, levels: Sequence[Tensor]) -> Fused:
        """levels: N block outputs [B, T, D], shallow to deep. The sum is computed in fp32."""
        *shallow, deepest = levels
        if self.logits is None:
            return Fused(deepest, torch.ones(1, device=deepest.device))
        projected = [projection(x) for projection, x in zip(self.projections, shallow, strict=True)]
        weights = self.logits.float().softmax(dim=0)
        total = weights[-1] * deepest
        for weight, x in zip(weights, projected, strict=False):
            total = total + weight * x
        return Fused(total.to(deepest.dtype), weights.detach().flatten())


def fuse(fusion: nn.Module, levels: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Apply `fusion` to the levels. Returns tokens [B, T, D] and, for the log, weight_<name> of each level that has
    one.
    """
    tokens, weights = fusion(list(levels.values()))
    return tokens, {f"weight_{name}": weight for name, weight in zip(levels, weights, strict=False)}
