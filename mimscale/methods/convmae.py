"""ConvMAE (MCMAE): MAE whose encoder starts with masked convolutions (Gao et al., NeurIPS 2022, arXiv 2205.03892).

The mask is drawn on the grid of the attention stage, as in MAE, and masks whole windows of the convolution stages
(block-wise masking). The outputs of both stages are added to the last block's output before the encoder's norm
(multi-scale fusion), except in fine-tuning. Decoder, target and loss are MAE's.

Differences from the release: grids follow from the image and patch sizes, stages 1 and 2 compute visible windows only
(`stages.skip_masked`, same numbers up to rounding), and the class token is an option.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from mimscale.config.run import RunConfig
from mimscale.methods import mae
from mimscale.models.convvit import ConvStages, ConvViT, check_stages
from mimscale.types import TeacherInfo


class ConvMAEConfig(mae.MAEConfig):
    """As MAE's. stages: the convolution stages. The section `student` is the attention stage (base: 11 blocks)."""

    stages: ConvStages = ConvStages()


class ConvMAE(mae.MAE):
    """MAE with a ConvViT as `student`."""

    Config = ConvMAEConfig

    @classmethod
    def check(cls, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        super().check(run, teachers)
        check_stages(cast(ConvMAEConfig, run.method).stages, run.student)

    def make_student(self, run: RunConfig) -> ConvViT:
        stages = cast(ConvMAEConfig, run.method).stages
        return ConvViT(run.student, stages, run.data.image_size, recompute_every=run.engine.activation_checkpointing)
