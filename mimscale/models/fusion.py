"""Several levels of an encoder combined into one: a plain sum, or MFF's weights (Liu et al., ICCV 2023)."""

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
    """kind: none, a plain sum, or MFF's projections and softmax weights. levels: the 0-based blocks whose raw outputs
    are combined, ascending; ConvMAE's convolution stages, where there are some, come before them.
    """

    kind: Literal["none", "sum", "mff"] = "none"
    levels: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _of_something(self) -> FusionConfig:
        if self.kind != "none" and not self.levels:
            raise ValueError(f"kind = {self.kind} has nothing to combine; name some levels, or set kind = none")
        if self.kind == "none" and self.levels:
            raise ValueError(f"levels = {list(self.levels)} with kind = none are read by nobody; set kind = sum or mff")
        return self

    @property
    def replaces_last_block(self) -> bool:
        """Whether nothing reads the last block but the fusion."""
        return True


def check_fusion(config: FusionConfig, depth: int) -> None:
    """Refuse levels that do not exist among `depth` blocks, and blocks that nothing reads. Raises UserError."""
    if config.kind == "none":
        return
    levels, last = config.levels, depth - 1
    rising = list(levels) == sorted({level for level in levels if 0 <= level <= last})
    if config.replaces_last_block and (not rising or levels[-1] != last):
        raise UserError(
            f"method.fusion.levels = {list(levels)} must rise from 0 or more to {last}, the student's last block: "
            "blocks above the last level would get no gradient"
        )
    if not rising:
        raise UserError(f"method.fusion.levels = {list(levels)} must rise and lie in 0 to {last}")


def make_fusion(config: FusionConfig, width: int, stages: bool = False) -> LevelFusion | LevelSum | None:
    """stages: one more level comes before those of `config`."""
    if config.kind == "none":
        return None
    return LevelFusion(width, len(config.levels) + stages) if config.kind == "mff" else LevelSum()


class Fused(NamedTuple):
    """tokens: [B, T, D] in the type of the levels. weights: float32 [N], sum 1, without gradient, for the log; empty
    where levels have no weights.
    """

    tokens: Tensor
    weights: Tensor


class LevelSum(nn.Module):
    """The sum of N levels [B, T, D]."""

    def forward(self, levels: Sequence[Tensor]) -> Fused:
        return Fused(torch.stack(list(levels)).sum(dim=0), torch.empty(0))


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


def combined(fusion: nn.Module, levels: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The levels as one, [B, T, D], and for the log weight_<name>, the share of each, where they have shares."""
    tokens, weights = fusion(list(levels.values()))
    return tokens, {f"weight_{name}": weight for name, weight in zip(levels, weights, strict=False)}
