"""MR-MAE: mimic a teacher on the visible patches, rebuild pixels on the masked ones (arXiv 2303.05475, IJCV 2023).

A re-implementation from the paper; the authors' code is not public, so no run of this file reproduces theirs. Certain
from the abstract: two losses on disjoint patches, features of a frozen CLIP or DINO teacher for the visible quarter,
read from the encoder before the decoder, and MAE's pixels for the masked rest. With `stages` the encoder is ConvMAE's
(MR-MCMAE, called ConvMAE-v2 by its authors, with a class token). Everything else is our reading, see `MRMAEConfig`.

Differences to the authors' code: unknown. The pixel branch with uniform masks is MAE's and the draw of focused
mimicking is MaskAlign's, both held to official numbers; teacher, target, head, loss and weights of the mimic branch
are our reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from mimscale.config.run import RunConfig
from mimscale.errors import UserError
from mimscale.methods import base, mae
from mimscale.models.convvit import ConvStages, ConvViT, check_stages
from mimscale.models.feature_targets import FeatureConfig, check_features, feature_targets
from mimscale.models.fusion import FusionConfig
from mimscale.models.heads import make_adaptor
from mimscale.models.targets import FeatureLoss, feature_loss
from mimscale.models.token_selection import in_raster_order
from mimscale.models.vit import LN_EPS, ViT
from mimscale.types import Batch, Targets, TeacherInfo, TeacherNeeds


class MimicFusion(FusionConfig):
    """feeds: the mimic heads alone, after a norm of their own, while the decoder reads the last block; or both of them,
    after the encoder's last norm: MFF under two losses.
    """

    feeds: Literal["mimic", "both"] = "mimic"

    @property
    def replaces_last_block(self) -> bool:
        return self.feeds == "both"


class MRMAEConfig(FeatureConfig, mae.MAEConfig):
    """Every default below is our reading, not a published setting; MAE's decoder and mask ratio are inherited.

    stages: convolution stages before the ViT; null: a plain ViT.
    masking: focused mimicking, the visible patches are drawn in proportion to a teacher's CLS attention.
    fusion: multi-layer fusion, none; without, the mimic heads read what the decoder reads.
    levels: the raw outputs of a teacher's blocks that are mimicked, each with an adaptor of its own; the last alone.
    targets: weights and levels of single teachers; every weight 1. pixel_weight: of the pixels.
    """

    stages: ConvStages | None = None
    masking: base.AnyMasking = base.masking_default("attention", 0.75)
    fusion: MimicFusion = MimicFusion()
    mimic_loss: FeatureLoss = "l2"
    pixel_weight: float = Field(1.0, gt=0)


class MRMAE(mae.MAE):
    """`student` and `decoder` are MAE's or ConvMAE's; `mimic` holds a head per teacher and level; both losses reach the
    student. After pre-training decoder, heads and fusion are dropped.
    """

    Config = MRMAEConfig
    config: MRMAEConfig

    @classmethod
    def reads(cls, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> dict[str, TeacherNeeds]:
        targets = feature_targets(cast(MRMAEConfig, run.method), teachers)
        return {name: target.needs for name, target in targets.items()}

    @classmethod
    def check(cls, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        config = cast(MRMAEConfig, run.method)
        if config.stages is not None:
            check_stages(config.stages, run.student)
        check_features(config, teachers, run)
        classless = config.stages is not None and not config.stages.class_token
        if classless and any(target.cls for target in feature_targets(config, teachers).values()):
            raise UserError("method.cls_target = true, but the student has no class token; set stages.class_token")
        super().check(run, teachers)

    def __init__(self, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        super().__init__(run, teachers)
        config, width = self.config, run.student.width
        alone = config.fusion.kind != "none" and config.fusion.feeds == "mimic"
        self.fusion_norm = nn.LayerNorm(width, eps=LN_EPS) if alone else None
        self.targets = feature_targets(config, teachers)
        self.mimic = nn.ModuleDict(
            {
                name: nn.ModuleDict({str(i): make_adaptor(config.adaptor, width, target.dim) for i in target.shares})
                for name, target in self.targets.items()
            }
        )

    def make_student(self, run: RunConfig) -> ViT | ConvViT:
        stages = cast(MRMAEConfig, run.method).stages
        if stages is None:
            return super().make_student(run)
        return ConvViT(run.student, stages, run.data.image_size, checkpoint_every=run.engine.activation_checkpointing)

    def encode(self, batch: Batch, visible_BK: Tensor) -> mae.Encoded:
        if self.fusion_norm is None:
            return super().encode(batch, visible_BK)
        levels = self.config.fusion.levels
        out = self.student(batch.images, visible_BK, batch.noise.get("drop_path"), levels)
        mixed, scalars = self.mixed(out)
        return mae.Encoded(out.tokens, self.fusion_norm(mixed), scalars)

    def forward(self, batch: Batch, targets: Mapping[str, Targets]) -> dict[str, Tensor]:
        """Scalars: loss, before their weights pixel and mimic_<teacher>, and the shares of fused levels."""
        masks = self.masking.choose(batch, targets)
        raster = in_raster_order(masks)
        latent, fused, scalars = self.encode(batch, masks.visible)
        pred = self.decoder(latent, raster)
        pixel = mae.masked_patch_loss(pred, raster.of(self.target(batch.images)), raster.mask)
        mimic = {name: self._mimicked(name, fused, targets[name], masks.visible) for name in self.targets}
        weighted = [self.targets[name].weight * loss for name, loss in mimic.items()]
        loss = torch.stack([self.config.pixel_weight * pixel, *weighted]).sum()
        mimicked = {f"mimic_{name}": value.detach() for name, value in mimic.items()}
        return {"loss": loss, "pixel": pixel.detach(), **mimicked, **scalars}

    def _mimicked(self, name: str, fused_BTD: Tensor, seen: Targets, visible_BK: Tensor) -> Tensor:
        """The mean over one teacher's levels, by their shares."""
        target, heads = self.targets[name], cast(nn.ModuleDict, self.mimic[name])
        tokens = fused_BTD if target.cls else fused_BTD[:, self.student.prefix :]
        losses = [
            share * feature_loss(heads[str(level)](tokens), target.of(seen, level, visible_BK), self.config.mimic_loss)
            for level, share in target.shares.items()
        ]
        return torch.stack(losses).sum()
