"""MaskAlign: a masked student aligned with a frozen teacher (Xue et al., CVPR 2023, arXiv 2211.08887).

Differences to the release: only adaptors and mixing rows of supervised levels are built, and no last norm of the
student, because the others never get a gradient and ZeRO would pay for them; the teacher is outside the checkpoint and
runs in 16 bit; target_norm = bn is refused, because its loss would depend on the number of ranks; combinations of
depths that end in an index error there are refused with the choice that works (fusion = sum).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast

import torch
from pydantic import field_validator
from torch import Tensor

from mimscale.config import RunConfig
from mimscale.contracts import Batch, Targets, TeacherInfo, TeacherNeeds, View
from mimscale.errors import UserError
from mimscale.methods import base
from mimscale.models.features import check_grid
from mimscale.models.heads import Adaptor, Alignment, Fusion, level_weights
from mimscale.models.masking import gather_tokens, in_raster_order
from mimscale.models.patches import unnormalised
from mimscale.models.targets import FeatureNorm, feature_loss, normalise_features
from mimscale.models.vit import ViT


class MaskAlignConfig(base.MaskedConfig):
    """Defaults are the published recipe. The official flag is named where ours differs.

    masking: 0.7, in proportion to a teacher's CLS attention (mask_type).
    fusion: trained mixing of student levels that starts at identity + 0.01 (linear) or at 1/N (sum, the only one for
    unequal depths), or level i to level i (simple) (fusion_type).
    adaptor: from the student's width to the teacher's, one per supervised level (head_type; mlp_norm is its mlp2).
    target_norm: LayerNorm without affine (whiten), unit length (l2) or as they are, per token.
    levels: weight of each teacher level in the loss (loss_weights). cls_target: align the class token as well; false is
    ours, for teachers without one. teacher: which of several `teachers`.
    """

    masking: base.AnyMasking = base.masking_default("attention", 0.7)
    fusion: Fusion = "linear"
    adaptor: Adaptor = "linear"
    target_norm: FeatureNorm = "whiten"
    loss: Literal["smoothl1", "l2", "l1"] = "smoothl1"
    levels: str = "top5"
    cls_target: bool = True
    teacher: str | None = None

    @field_validator("target_norm", mode="before")
    @classmethod
    def _no_batch_statistics(cls, value: object) -> object:
        if value == "bn":
            raise ValueError(
                "target_norm = 'bn' uses the statistics of one rank's batch, so the loss would depend on the number of "
                "ranks; choose whiten, l2 or none"
            )
        return value


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
        check_grid(name, info, run)
        if config.fusion != "sum" and info.depth != run.student.depth:
            raise UserError(
                f"method.fusion = {config.fusion} needs a teacher as deep as the student ({info.depth} and "
                f"{run.student.depth} blocks); set method.fusion = sum"
            )
        if config.cls_target and not info.has_cls:
            raise UserError(
                f"method.cls_target = true, but teachers.{name} has no class token; set method.cls_target = false"
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
            width=run.student.width,
            target_width=info.dim,
            student_depth=run.student.depth,
            supervised=tuple(self.level_weights),
        )

    def make_student(self, run: RunConfig) -> ViT:
        size, every = run.data.image_size, run.engine.activation_checkpointing
        return ViT(run.student, size, final_norm=False, checkpoint_every=every)

    def target(self, targets: Targets, level: int, ids_keep_BK: Tensor) -> Tensor:
        """Normalised teacher features of one level at the kept positions, class token first: float32 [B, 1+K, C]."""
        features = gather_tokens(targets.levels[level], ids_keep_BK)
        if self.config.cls_target:
            features = torch.cat([targets.cls[level][:, None], features], dim=1)
        return normalise_features(features, self.config.target_norm)

    def forward(self, batch: Batch, targets: Mapping[str, Targets]) -> dict[str, Tensor]:
        """Scalars: loss, and level_<i> for each supervised teacher level before its weight."""
        teacher = targets[self.teacher]
        ids_keep = self.masking.choose(batch, targets).visible
        out = self.student(batch.images, ids_keep, batch.noise.get("drop_path"), self.alignment.student_levels)
        first = 0 if self.config.cls_target else 1
        losses = {
            level: feature_loss(pred[:, first:], self.target(teacher, level, ids_keep), self.config.loss)
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
