"""MFF: MAE whose decoder gets several encoder levels, not the last alone (Liu et al., ICCV 2023, arXiv 2308.00261).

Differences to the release: the MLP biases of the encoder start at zero, as MAE's do (theirs at N(0, 1e-6)), and the
warm-up of the recipes at zero (theirs at 1e-9 of the peak).
"""

from __future__ import annotations

from typing import Literal

from mimscale.methods import mae
from mimscale.models.fusion import FusionConfig


class MFFFusion(FusionConfig):
    """The last block is one of the levels; the default is the published choice for ViT-B."""

    kind: Literal["mff"] = "mff"
    levels: tuple[int, ...] = (0, 2, 4, 6, 8, 11)


class MFFConfig(mae.MAEConfig):
    """MAE's, with MFF's fusion."""

    fusion: MFFFusion = MFFFusion()


class MFF(mae.MAE):
    """`fusion` mixes raw block outputs of the visible tokens; the encoder's last norm follows and then MAE's decoder.

    As released, the class and mask tokens are exempt from weight decay and the fusion logits are not, which draws the
    weights together. After pre-training the fusion is dropped: `student` is a plain ViT that ends in its last block.
    """

    Config = MFFConfig

    def no_weight_decay(self) -> set[str]:
        return mae.TOKENS
