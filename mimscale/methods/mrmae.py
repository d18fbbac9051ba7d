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
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from mimscale.config import RunConfig
from mimscale.contracts import Batch, Targets, TeacherInfo, TeacherNeeds
from mimscale.errors import UserError
from mimscale.methods import base, mae
from mimscale.models.convvit import ConvStages, ConvViT, check_stages
from mimscale.models.features import FeatureConfig, check_features, feature_target
from mimscale.models.fusion import FusionConfig
from mimscale.models.heads import make_adaptor
from mimscale.models.masking import in_raster_order
from mimscale.models.targets import FeatureLoss, feature_loss
from mimscale.models.vit import LN_EPS, ViT

Weight = Annotated[float, Field(gt=0)]


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
    mimic_loss: of one block of each teacher, raw, with an adaptor of its own. teacher_levels: which block, from 0; the
    last where not named. teacher_weights: weight of each mimic loss, 1 where not named. pixel_weight: of the pixels.
    """

    stages: ConvStages | None = None
    masking: base.AnyMasking = base.masking_default("attention", 0.75)
    fusion: MimicFusion = MimicFusion()
    mimic_loss: FeatureLoss = "l2"
    teacher_levels: dict[str, int] = Field(default_factory=dict)
    teacher_weights: dict[str, Weight] = Field(default_factory=dict)
    pixel_weight: Weight = 1.0


class MRMAE(mae.MAE):
    """`student` and `decoder` are MAE's or ConvMAE's; `mimic` holds a head per teacher; both losses reach the student.

    After pre-training decoder, heads and fusion are dropped.
    """

    Config = MRMAEConfig
    config: MRMAEConfig

    @classmethod
    def reads(cls, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> dict[str, TeacherNeeds]:
        levels = _mimicked(cast(MRMAEConfig, run.method), teachers)
        return {name: TeacherNeeds(levels=(level,)) for name, level in levels.items()}

    @classmethod
    def check(cls, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        config = cast(MRMAEConfig, run.method)
        if config.stages is not None:
            check_stages(config.stages, run.student)
        if not teachers:
            raise UserError("method.name = mrmae needs a teacher and the section teachers is empty; add one there")
        for name, info in teachers.items():
            check_features(config, name, info, run)
        if config.cls_target and config.stages is not None and not config.stages.class_token:
            raise UserError("method.cls_target = true, but the student has no class token; set stages.class_token")
        for key, named in (("teacher_weights", config.teacher_weights), ("teacher_levels", config.teacher_levels)):
            for name in named:
                if name not in teachers:
                    raise UserError(f"method.{key}.{name}: no such teacher; choose from {', '.join(teachers)}")
        for name, level in config.teacher_levels.items():
            if not 0 <= level < teachers[name].depth:
                raise UserError(
                    f"method.teacher_levels.{name} = {level}: the teacher has blocks 0 to {teachers[name].depth - 1}"
                )
        super().check(run, teachers)

    def __init__(self, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        super().__init__(run, teachers)
        config, width = self.config, run.student.width
        alone = config.fusion.kind != "none" and config.fusion.feeds == "mimic"
        self.fusion_norm = nn.LayerNorm(width, eps=LN_EPS) if alone else None
        self.mimic = nn.ModuleDict(
            {name: make_adaptor(config.adaptor, width, info.dim) for name, info in teachers.items()}
        )
        self.target_level = _mimicked(config, teachers)

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
        seen = fused if self.config.cls_target else fused[:, self.student.prefix :]
        mimic = {}
        for (name, head), level in zip(self.mimic.items(), self.target_level.values(), strict=True):
            target = feature_target(targets[name], level, masks.visible, self.config)
            mimic[name] = feature_loss(head(seen), target, self.config.mimic_loss)
        weighted = [self.config.teacher_weights.get(name, 1.0) * loss for name, loss in mimic.items()]
        loss = torch.stack([self.config.pixel_weight * pixel, *weighted]).sum()
        mimicked = {f"mimic_{name}": value.detach() for name, value in mimic.items()}
        return {"loss": loss, "pixel": pixel.detach(), **mimicked, **scalars}


def _mimicked(config: MRMAEConfig, teachers: Mapping[str, TeacherInfo]) -> dict[str, int]:
    """Teacher -> the block whose output is the target."""
    return {name: config.teacher_levels.get(name, info.depth - 1) for name, info in teachers.items()}
