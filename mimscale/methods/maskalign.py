"""MaskAlign: a masked student aligned with frozen teachers (Xue et al., CVPR 2023, arXiv 2211.08887).

Differences from the release: adaptors and mixing rows exist for supervised levels only, and the student has no final
norm, because the others never get a gradient and would still cost memory and communication; the teacher is not in the
checkpoint and runs in 16 bit, and there may be several, each with its own mixing and adaptors; target_norm = bn is
refused, because its loss would depend on the number of ranks; combinations of depths that end in an index error there
are refused with the choice that works (fusion = sum).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from mimscale.config.run import RunConfig
from mimscale.errors import UserError
from mimscale.methods import base
from mimscale.models.feature_targets import FeatureConfig, Levels, check_features, feature_targets
from mimscale.models.heads import AdaptorPosition, Alignment, Fusion
from mimscale.models.targets import FeatureLoss, feature_loss
from mimscale.models.token_selection import raster_order
from mimscale.models.vit import ViT
from mimscale.types import Batch, Targets, TeacherInfo, TeacherNeeds, View


class MaskAlignConfig(FeatureConfig, base.MaskedConfig):
    """Defaults are the published recipe. The official flag is in parentheses if its name differs.

    masking: 0.7, in proportion to a teacher's CLS attention (mask_type).
    fusion: learned mixing of student levels, initialised with identity + 0.01 (linear) or 1/N (sum, the only choice for
        unequal depths); or student level i to teacher level i (simple) (fusion_type).
    adaptor (head_type): from the student's width to the teacher's (mlp_norm is the release's mlp2).
    loss: the distance of features, averaged over tokens and channels.
    adaptor_position: after the mixing, one for each supervised teacher level, as released. Experimental: before it, one
        for each student block, as the paper draws it, which is another function with more parameters. No official
        numbers exist for it and no run at full size was made; tests compare it with a second implementation and train
        it at small size.
    levels: weight of each teacher level in the loss (loss_weights).
    cls_target: predict the class token as well; false is ours, for teachers without a class token.
    targets: other values for single teachers (ours; the release has one teacher).
    """

    masking: base.AnyMasking = base.masking_default("attention", 0.7)
    fusion: Fusion = "linear"
    adaptor_position: AdaptorPosition = "after"
    loss: FeatureLoss = "smoothl1"
    levels: Levels = "top5"
    cls_target: bool = True


class MaskAlign(base.MaskedMethod):
    """`student` (without a final norm) encodes the visible patches, `alignment` predicts the teachers' features."""

    Config = MaskAlignConfig
    predicts_masked = False
    student: ViT

    @classmethod
    def teacher_needs(cls, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> dict[str, TeacherNeeds]:
        targets = feature_targets(cast(MaskAlignConfig, run.method), teachers)
        return {name: target.needs for name, target in targets.items()}

    @classmethod
    def check(cls, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        config = cast(MaskAlignConfig, run.method)
        check_features(config, teachers, run)
        targets = feature_targets(config, teachers)
        for name in targets:
            depth = teachers[name].depth
            if config.fusion != "sum" and depth != run.student.depth:
                raise UserError(
                    f"method.fusion = {config.fusion} needs teachers as deep as the student (teachers.{name} {depth} "
                    f"blocks, the student {run.student.depth}); set method.fusion = sum"
                )
        last = run.student.depth - 1
        if config.fusion == "simple" and not any(last in target.shares for target in targets.values()):
            raise UserError(
                f"method.levels = {config.levels} with fusion = simple leaves the student's last blocks without a "
                "gradient; choose fusion = linear or sum"
            )
        if config.fusion == "simple" and config.adaptor_position == "before":
            raise UserError(
                "method.adaptor_position = before with fusion = simple: without mixing both positions are the same "
                "function; set adaptor_position = after"
            )
        super().check(run, teachers)

    def __init__(self, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        super().__init__(run, teachers)
        self.config = config = cast(MaskAlignConfig, run.method)
        self.targets = feature_targets(config, teachers)
        self.alignment = nn.ModuleDict(
            {
                name: Alignment(
                    fusion=config.fusion,
                    adaptor=config.adaptor,
                    before=config.adaptor_position == "before",
                    width=run.student.width,
                    target_width=target.dim,
                    student_depth=run.student.depth,
                    supervised=tuple(target.shares),
                )
                for name, target in self.targets.items()
            }
        )

    def make_student(self, run: RunConfig) -> ViT:
        size, every = run.data.image_size, run.engine.activation_checkpointing
        return ViT(run.student, size, final_norm=False, recompute_every=every)

    @property
    def student_levels(self) -> list[int]:
        """Student blocks whose output is used."""
        return sorted({level for head in self.alignment.values() for level in cast(Alignment, head).student_levels})

    def forward(self, batch: Batch, targets: Mapping[str, Targets]) -> dict[str, Tensor]:
        """Scalars: loss, and level_<teacher>_<i>, the unweighted loss of each supervised level."""
        visible = self.masking.choose(batch, targets).visible
        out = self.student(batch.images, visible, batch.noise.get("drop_path"), self.student_levels)
        losses, weighted = {}, []
        for name, target in self.targets.items():
            predictions = self.alignment[name](out.levels)
            for (level, share), pred in zip(target.shares.items(), predictions, strict=True):
                features = target.features(targets[name], level, visible)
                loss = feature_loss(pred if target.cls else pred[:, self.student.prefix :], features, self.config.loss)
                losses[f"level_{name}_{level}"] = loss.detach()
                weighted.append(target.weight * share * loss)
        return {"loss": torch.stack(weighted).sum(), **losses}

    @torch.no_grad()
    def view(self, batch: Batch, targets: Mapping[str, Targets]) -> View:
        """Images, mask and importance."""
        return self.make_view(batch, targets, raster_order(self.masking.choose(batch, targets)))

    def no_weight_decay(self) -> set[str]:
        return {f"alignment.{name}.mixing" for name in self.targets} if self.config.fusion != "simple" else set()
