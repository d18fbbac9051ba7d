"""MaskAlign: a masked student aligned with a frozen teacher (Xue et al., CVPR 2023, arXiv 2211.08887).

Differences to the release: only adaptors and mixing rows of supervised levels are built, and no last norm of the
student, because the others never get a gradient and ZeRO would pay for them; the teacher is outside the checkpoint and
runs in 16 bit; target_norm = bn is refused, because its loss would depend on the number of ranks; combinations of
depths that end in an index error there are refused with the choice that works (fusion = sum).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from mimscale.config import RunConfig
from mimscale.contracts import Batch, Targets, TeacherInfo, TeacherNeeds, View
from mimscale.errors import UserError
from mimscale.methods import base
from mimscale.models.features import FeatureConfig, check_features, feature_target
from mimscale.models.heads import AdaptorPosition, Alignment, Fusion, level_weights
from mimscale.models.masking import in_raster_order
from mimscale.models.patches import unnormalised
from mimscale.models.targets import FeatureLoss, feature_loss
from mimscale.models.vit import ViT


class MaskAlignConfig(FeatureConfig, base.MaskedConfig):
    """Defaults are the published recipe. The official flag is named where ours differs.

    masking: 0.7, in proportion to a teacher's CLS attention (mask_type).
    fusion: trained mixing of student levels that starts at identity + 0.01 (linear) or at 1/N (sum, the only one for
    unequal depths), or level i to level i (simple) (fusion_type).
    adaptor: its official flag is head_type. adaptor_position: after the mixing, one for each supervised teacher level,
    as released; or before it, one for each student block, as the paper's figure draws it: another function, with more
    parameters.
    levels: weight of each teacher level in the loss (loss_weights). cls_target: false is ours, for teachers without a
    class token. teacher: which of several `teachers`.
    """

    masking: base.AnyMasking = base.masking_default("attention", 0.7)
    fusion: Fusion = "linear"
    adaptor_position: AdaptorPosition = "after"
    loss: FeatureLoss = "smoothl1"
    levels: str = "top5"
    cls_target: bool = True
    teacher: str | None = None


class MaskAlign(base.MaskedMethod):
    """`student` (no final norm: nothing would train it) sees the kept patches, `alignment` predicts the teacher."""

    Config = MaskAlignConfig
    predicts_masked = False
    student: ViT

    @classmethod
    def reads(cls, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> dict[str, TeacherNeeds]:
        config = cast(MaskAlignConfig, run.method)
        name = _teacher_name(config, teachers)
        return {name: TeacherNeeds(levels=tuple(_supervised(config, teachers[name].depth)))}

    @classmethod
    def check(cls, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        config = cast(MaskAlignConfig, run.method)
        name = _teacher_name(config, teachers)
        info = teachers[name]
        check_features(config, name, info, run)
        if config.fusion != "sum" and info.depth != run.student.depth:
            raise UserError(
                f"method.fusion = {config.fusion} needs a teacher as deep as the student ({info.depth} and "
                f"{run.student.depth} blocks); set method.fusion = sum"
            )
        try:
            weights = level_weights(config.levels, info.depth)
        except ValueError as error:
            raise UserError(f"method.levels = {config.levels}: {error}") from None
        if config.fusion == "simple" and not weights[-1]:
            raise UserError(
                f"method.levels = {config.levels} with fusion = simple leaves the student's last blocks without a "
                "gradient; choose fusion = linear or sum"
            )
        if config.fusion == "simple" and config.adaptor_position == "before":
            raise UserError(
                "method.adaptor_position = before with fusion = simple: nothing is mixed, so there is no before; set "
                "adaptor_position = after, which is the same function"
            )
        super().check(run, teachers)

    def __init__(self, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        super().__init__(run, teachers)
        self.config = config = cast(MaskAlignConfig, run.method)
        self.teacher = _teacher_name(config, teachers)
        info = teachers[self.teacher]
        self.level_weights = _supervised(config, info.depth)
        self.alignment = Alignment(
            fusion=config.fusion,
            adaptor=config.adaptor,
            before=config.adaptor_position == "before",
            width=run.student.width,
            target_width=info.dim,
            student_depth=run.student.depth,
            supervised=tuple(self.level_weights),
        )

    def make_student(self, run: RunConfig) -> ViT:
        size, every = run.data.image_size, run.engine.activation_checkpointing
        return ViT(run.student, size, final_norm=False, checkpoint_every=every)

    def forward(self, batch: Batch, targets: Mapping[str, Targets]) -> dict[str, Tensor]:
        """Scalars: loss, and level_<i> for each supervised teacher level before its weight."""
        teacher = targets[self.teacher]
        visible = self.masking.choose(batch, targets).visible
        out = self.student(batch.images, visible, batch.noise.get("drop_path"), self.alignment.student_levels)
        first = 0 if self.config.cls_target else 1
        losses = {
            level: feature_loss(pred[:, first:], feature_target(teacher, level, visible, self.config), self.config.loss)
            for level, pred in zip(self.level_weights, self.alignment(out.levels), strict=True)
        }
        total = torch.stack([self.level_weights[level] * loss for level, loss in losses.items()]).sum()
        return {"loss": total, **{f"level_{level}": loss.detach() for level, loss in losses.items()}}

    @torch.no_grad()
    def view(self, batch: Batch, targets: Mapping[str, Targets]) -> View:
        """The images, the mask, and the attention that chose it."""
        raster, patches = in_raster_order(self.masking.choose(batch, targets)), self.student.patches
        return View(
            unnormalised(batch.images),
            mask=raster.spread(raster.mask, patches),
            thrown=raster.thrown(patches),
            attention=self.masking.weights(batch, targets),
        )

    def no_weight_decay(self) -> set[str]:
        return set() if self.alignment.mixing is None else {"alignment.mixing"}


def _supervised(config: MaskAlignConfig, depth: int) -> dict[int, float]:
    """Teacher level -> its weight in the loss, where that is not zero."""
    return {level: weight for level, weight in enumerate(level_weights(config.levels, depth)) if weight}


def _teacher_name(config: MaskAlignConfig, teachers: Mapping[str, TeacherInfo]) -> str:
    if not teachers:
        raise UserError("method.name = maskalign needs a teacher and the section teachers is empty; add one there")
    if config.teacher is None and len(teachers) > 1:
        raise UserError(f"method.teacher is not set and there are several: choose one of {', '.join(teachers)}")
    name = config.teacher or next(iter(teachers))
    if name not in teachers:
        raise UserError(f"method.teacher = '{name}' is not in teachers; choose one of {', '.join(teachers)}")
    return name
