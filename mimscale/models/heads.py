"""MaskAlign's head: mixing of student levels, and adaptors to the teacher's width (Xue et al. 2023).

As released, student levels are mixed first, and each supervised teacher level has an adaptor. As the paper draws it,
each student level has an adaptor, and the adapted levels are mixed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mimscale.models.vit import LN_EPS, Linear

Fusion = Literal["linear", "sum", "simple"]
Adaptor = Literal["linear", "norm_linear", "mlp", "mlp_norm"]
AdaptorPosition = Literal["after", "before"]


def level_weights(rule: str | Sequence[int], depth: int) -> tuple[float, ...]:
    """Weight of each of `depth` teacher levels in the loss; they sum to 1.

    top<k>: 1/k on the last k. mean: all equal. out: the last only. linear_decay: i / sum for level i, so the first gets
    0 and, despite the official name, the weight rises. mid<i>: only level i (0-based). A list of levels: equal weights
    (ours). Raises ValueError with a one-line reason.
    """
    if not isinstance(rule, str):
        if list(rule) != sorted({level for level in rule if 0 <= level < depth}):
            raise ValueError(f"must be ascending and lie in the teacher's levels, 0 to {depth - 1}")
        return tuple(float(level in rule) / len(rule) for level in range(depth))
    if rule == "mean":
        return (1 / depth,) * depth
    if rule == "out":
        return (0.0,) * (depth - 1) + (1.0,)
    if rule == "linear_decay":
        if depth < 2:
            raise ValueError("linear_decay needs a teacher of at least 2 blocks")
        return tuple(level / sum(range(depth)) for level in range(depth))
    if match := re.fullmatch(r"top(\d+)", rule):
        count = int(match[1])
        if not 1 <= count <= depth:
            raise ValueError(f"{rule} needs 1 to {depth} levels, the depth of the teacher")
        return (0.0,) * (depth - count) + (1 / count,) * count
    if match := re.fullmatch(r"mid(\d+)", rule):
        if int(match[1]) >= depth:
            raise ValueError(f"{rule} does not exist: the teacher's levels are 0 to {depth - 1}")
        return tuple(float(level == int(match[1])) for level in range(depth))
    raise ValueError(f"'{rule}' is unknown; choose top<k>, mean, out, linear_decay or mid<i>")


def make_adaptor(kind: Adaptor, width: int, target_width: int) -> nn.Module:
    """[..., D] -> [..., C]. The names are the official ones, except mlp_norm, officially mlp2."""
    if kind == "linear":
        return Linear(width, target_width)
    if kind == "norm_linear":
        return nn.Sequential(nn.LayerNorm(width, eps=LN_EPS), Linear(width, target_width))
    if kind == "mlp":
        return nn.Sequential(Linear(width, width), nn.GELU(), Linear(width, target_width))
    return nn.Sequential(Linear(width, width), nn.LayerNorm(width, eps=LN_EPS), Linear(width, target_width))


def initial_mixing(fusion: Literal["linear", "sum"], student_depth: int, supervised: Sequence[int]) -> Tensor:
    """[S, N] float32: rows of identity + 0.01 (linear), or 1/N everywhere (sum)."""
    if fusion == "sum":
        return torch.full((len(supervised), student_depth), 1 / student_depth)
    return torch.eye(student_depth)[list(supervised)] + 0.01


class Alignment(nn.Module):
    """Predicts the supervised teacher levels (and only those) from the student's levels.

    mixing: [S, N], a row for each supervised level in ascending order, a column for each student block; no softmax.
    adaptors: after the mixing, keyed by teacher level; with `before` before it, keyed by student level (experimental,
    see `methods.maskalign.MaskAlignConfig`).
    """

    def __init__(
        self,
        *,
        fusion: Fusion,
        adaptor: Adaptor,
        width: int,
        target_width: int,
        student_depth: int,
        supervised: Sequence[int],
        before: bool = False,
    ) -> None:
        super().__init__()
        self.supervised = tuple(supervised)
        self.before = before
        self.student_levels = self.supervised if fusion == "simple" else tuple(range(student_depth))
        mixing = None if fusion == "simple" else nn.Parameter(initial_mixing(fusion, student_depth, self.supervised))
        self.register_parameter("mixing", mixing)
        adapted = self.student_levels if before else self.supervised
        self.adaptors = nn.ModuleDict({str(i): make_adaptor(adaptor, width, target_width) for i in adapted})

    def aggregate(self, levels: Mapping[int, Tensor]) -> list[Tensor]:
        """Student level -> features [B, T, X]; returns mixed features [B, T, X] for each supervised level."""
        if self.mixing is None:
            return [levels[level] for level in self.supervised]
        stacked = torch.stack([levels[level] for level in self.student_levels])
        return list(torch.einsum("sn,nbtd->sbtd", self.mixing, stacked))

    def forward(self, levels: Mapping[int, Tensor]) -> list[Tensor]:
        """Student level -> block output [B, T, D]; returns predictions [B, T, C], one for each supervised teacher level
        in ascending order.

        A list, because ZeRO-3 searches module outputs for tensors and fails at a dict whose keys are not strings.
        """
        if self.before:
            return self.aggregate({level: self.adaptors[str(level)](levels[level]) for level in self.student_levels})
        return [adaptor(x) for adaptor, x in zip(self.adaptors.values(), self.aggregate(levels), strict=True)]
