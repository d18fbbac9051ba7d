"""MFF: MAE whose decoder gets several encoder levels, not the last alone (Liu et al., ICCV 2023, arXiv 2308.00261).

Differences to the release: the MLP biases of the encoder start at zero, as MAE's do (theirs at N(0, 1e-6)), and the
warm-up of the recipes at zero (theirs at 1e-9 of the peak).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from pydantic import Field
from torch import Tensor

from mimscale.config import RunConfig
from mimscale.contracts import Batch, TeacherInfo
from mimscale.errors import UserError
from mimscale.methods import mae
from mimscale.models.fusion import LevelFusion


class MFFConfig(mae.MAEConfig):
    """MAE's, and levels: the 0-based encoder blocks that are fused, ascending; the last block is one of them."""

    levels: tuple[int, ...] = Field((0, 2, 4, 6, 8, 11), min_length=1)


class MFF(mae.MAE):
    """`fusion` mixes raw block outputs of the visible tokens; the encoder's last norm follows and then MAE's decoder.

    As released, the class and mask tokens are exempt from weight decay and the fusion logits are not, which draws the
    weights together. After pre-training the fusion is dropped: `student` is a plain ViT that ends in its last block.
    """

    Config = MFFConfig

    @classmethod
    def check(cls, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        super().check(run, teachers)
        levels, last = cast(MFFConfig, run.method).levels, run.student.depth - 1
        if levels != tuple(sorted(set(levels))) or levels[0] < 0 or levels[-1] != last:
            raise UserError(
                f"method.levels = {list(levels)} must rise from 0 or more to {last}, the student's last block: blocks "
                "above the last level would get no gradient"
            )

    def __init__(self, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        super().__init__(run, teachers)
        self.levels = cast(MFFConfig, run.method).levels
        self.fusion = LevelFusion(run.student.width, len(self.levels))

    def encode(self, batch: Batch, ids_keep_BK: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalars: weight_<block>, the share of each level."""
        drop_noise = batch.noise.get("drop_path")
        out = self.student(batch.images, ids_keep_BK, drop_noise, self.levels, apply_norm=False)
        fused = self.fusion([out.levels[level] for level in self.levels])
        weights = {f"weight_{level}": weight for level, weight in zip(self.levels, fused.weights, strict=True)}
        return self.student.norm(fused.tokens), weights

    def no_weight_decay(self) -> set[str]:
        return mae.TOKENS
