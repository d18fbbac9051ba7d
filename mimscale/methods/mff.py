"""MFF: MAE whose decoder gets several fused encoder levels (Liu et al., ICCV 2023, arXiv 2308.00261).

Differences from the release: the MLP biases of the encoder start at zero, as in MAE (theirs at N(0, 1e-6)).
"""

from __future__ import annotations

from typing import Literal

from mimscale.methods import mae
from mimscale.models.fusion import FusionConfig


class MFFFusion(FusionConfig):
    """The last block must be one of the levels; the default is the published choice for ViT-B."""

    kind: Literal["mff"] = "mff"
    levels: tuple[int, ...] = (0, 2, 4, 6, 8, 11)


class MFFConfig(mae.MAEConfig):
    """As MAE's, with MFF's fusion."""

    fusion: MFFFusion = MFFFusion()


class MFF(mae.MAE):
    """`fusion` fuses block outputs of the visible patches; then follow the encoder's final norm and MAE's decoder.

    As released, the class and mask tokens have no weight decay, but the fusion logits have, which makes the weights
    more equal. After pre-training the fusion is discarded: `student` is a plain ViT.
    """

    Config = MFFConfig

    def no_weight_decay(self) -> set[str]:
        return mae.TOKENS
