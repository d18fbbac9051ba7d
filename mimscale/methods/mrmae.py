"""MR-MAE: teacher features on the visible patches, pixels on the masked ones (arXiv 2303.05475, IJCV 2023).

A re-implementation from the paper. The authors' code is not public, so it was never compared with theirs.
Certain from the abstract: two losses on disjoint patches, features of a frozen CLIP or DINO teacher for the visible
quarter, predicted from the encoder's output, and MAE's pixels for the masked rest. With `stages` the encoder is
ConvMAE's (MR-MCMAE, called ConvMAE-v2 by its authors, with a class token). The rest is our interpretation, see
`MRMAEConfig`.

Differences from the authors' code: unknown. The pixel branch with uniform masks is MAE's and the masks of focused
mimicking are MaskAlign's, both compared with official numbers; teacher, target, head, loss and weights of the mimic
branch are our interpretation.
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
from mimscale.models.vit import LN_EPS, ViT
from mimscale.types import Batch, Targets, TeacherInfo, TeacherNeeds


class MimicFusion(FusionConfig):
    """feeds: mimic: the fused levels, after a norm of their own, are the input of the mimic heads, and the decoder gets
    the last block; both: they are the input of heads and decoder, after the encoder's final norm.
    """

    feeds: Literal["mimic", "both"] = "mimic"

    @property
    def replaces_last_block(self) -> bool:
        return self.feeds == "both"


class MRMAEConfig(FeatureConfig, mae.MAEConfig):
    """Every default below is our interpretation, not a published setting; decoder and mask ratio are MAE's.

    stages: convolution stages before the ViT; null: a plain ViT.
    masking: focused mimicking: the visible patches are drawn in proportion to a teacher's CLS attention.
    fusion: multi-layer fusion for the mimic heads; none: their input is the decoder's.
    levels: of the teacher, each with its own adaptor; the last by default.
    targets: weight (1 by default) and levels of single teachers. mimic_loss: the distance of
    features. pixel_weight: weight of the pixel loss.
    """

    stages: ConvStages | None = None
    masking: base.AnyMasking = base.masking_default("attention", 0.75)
    fusion: MimicFusion = MimicFusion()
    mimic_loss: FeatureLoss = "l2"
    pixel_weight: float = Field(1.0, gt=0, le=1e6)


class MRMAE(mae.MAE):
    """`student` and `decoder` are MAE's or ConvMAE's; `mimic` holds a head per teacher and level; both losses train the
    student. After pre-training decoder, heads and fusion are discarded.
    """

    Config = MRMAEConfig
    config: MRMAEConfig

    @classmethod
    def teacher_needs(cls, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> dict[str, TeacherNeeds]:
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
        return ConvViT(run.student, stages, run.data.image_size, recompute_every=run.engine.activation_checkpointing)

    def encode(self, batch: Batch, visible_BK: Tensor) -> mae.Encoded:
        if self.fusion_norm is None:
            return super().encode(batch, visible_BK)
        levels = self.config.fusion.levels
        out = self.student(batch.images, visible_BK, batch.noise.get("drop_path"), levels)
        fused, scalars = self.fuse_levels(out)
        return mae.Encoded(out.tokens, self.fusion_norm(fused), scalars)

    def forward(self, batch: Batch, targets: Mapping[str, Targets]) -> dict[str, Tensor]:
        """Scalars: loss, the unweighted losses pixel and mimic_<teacher>, and the weights of fused levels."""
        masks = self.masking.choose(batch, targets)
        latent, fused, scalars = self.encode(batch, masks.visible)
        pixel = self.pixel_loss(latent, masks, batch.images)
        mimic = {name: self._mimic_loss(name, fused, targets[name], masks.visible) for name in self.targets}
        weighted = [self.targets[name].weight * loss for name, loss in mimic.items()]
        loss = torch.stack([self.config.pixel_weight * pixel, *weighted]).sum()
        logged = {f"mimic_{name}": value.detach() for name, value in mimic.items()}
        return {"loss": loss, "pixel": pixel.detach(), **logged, **scalars}

    def _mimic_loss(self, name: str, fused_BTD: Tensor, targets: Targets, visible_BK: Tensor) -> Tensor:
        """Weighted mean over the levels of one teacher."""
        target, heads = self.targets[name], cast(nn.ModuleDict, self.mimic[name])
        tokens = fused_BTD if target.cls else fused_BTD[:, self.student.prefix :]
        losses = []
        for level, share in target.shares.items():
            features = target.features(targets, level, visible_BK)
            losses.append(share * feature_loss(heads[str(level)](tokens), features, self.config.mimic_loss))
        return torch.stack(losses).sum()
