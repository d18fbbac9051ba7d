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
from mimscale.models.convvit import ConvStages, ConvViT, ConvViTOutput, check_stages
from mimscale.models.features import check_grid
from mimscale.models.fusion import LevelFusion
from mimscale.models.heads import Adaptor, make_adaptor
from mimscale.models.masking import gather_tokens, in_raster_order
from mimscale.models.targets import feature_loss, normalise_features
from mimscale.models.vit import LN_EPS, ViT, ViTOutput

Weight = Annotated[float, Field(gt=0)]


class MRMAEConfig(mae.MAEConfig):
    """Every default below is our reading, not a published setting; MAE's decoder and mask ratio are inherited.

    stages: convolution stages before the ViT; null: a plain ViT.
    masking: focused mimicking, the visible patches are drawn in proportion to a teacher's CLS attention.
    levels: multi-layer fusion. 0-based attention blocks whose raw outputs are combined for the mimic head, with the
    convolution stages where there are some, and normalised; empty: the head reads what the decoder reads. fusion: plain
    sum, or MFF's projections and softmax weights (learned).
    adaptor: the head from the student's width to the teacher's, one per teacher.
    target_norm, mimic_loss: of the teacher's last block, raw, per token. cls_target: mimic the class token as well.
    teacher_weights: weight of each teacher's mimic loss, 1 where not named. pixel_weight: weight of the pixel loss.
    """

    stages: ConvStages | None = None
    masking: base.AnyMasking = base.masking_default("attention", 0.75)
    levels: tuple[int, ...] = ()
    fusion: Literal["sum", "learned"] = "sum"
    adaptor: Adaptor = "linear"
    target_norm: Literal["whiten", "none"] = "whiten"
    mimic_loss: Literal["l2", "smoothl1", "cosine"] = "l2"
    cls_target: bool = False
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
        return {name: TeacherNeeds(levels=(info.depth - 1,)) for name, info in teachers.items()}

    @classmethod
    def check(cls, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        config = cast(MRMAEConfig, run.method)
        if config.stages is not None:
            check_stages(config.stages, run.student)
        if not teachers:
            raise UserError("method.name = mrmae needs a teacher and the section teachers is empty; add one there")
        for name, info in teachers.items():
            check_grid(name, info, run)
            if config.cls_target and not info.has_cls:
                raise UserError(
                    f"method.cls_target = true, but teachers.{name} has no class token; set method.cls_target = false"
                )
        if config.cls_target and config.stages is not None and not config.stages.class_token:
            raise UserError("method.cls_target = true, but the student has no class token; set stages.class_token")
        for name in config.teacher_weights:
            if name not in teachers:
                raise UserError(f"method.teacher_weights.{name}: no such teacher; choose from {', '.join(teachers)}")
        depth = run.student.depth
        if list(config.levels) != sorted({level for level in config.levels if 0 <= level < depth}):
            raise UserError(f"method.levels = {list(config.levels)} must rise and lie in 0 to {depth - 1}")
        if config.fusion == "learned" and not config.levels:
            raise UserError(
                "method.fusion = learned has nothing to weigh; name some method.levels, or set fusion = sum"
            )
        super().check(run, teachers)

    def __init__(self, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        super().__init__(run, teachers)
        config = self.config
        width, count = run.student.width, len(config.levels) + (config.stages is not None)
        self.fusion = LevelFusion(width, count) if config.fusion == "learned" else None
        self.fusion_norm = nn.LayerNorm(width, eps=LN_EPS) if config.levels else None
        self.mimic = nn.ModuleDict(
            {name: make_adaptor(config.adaptor, width, info.dim) for name, info in teachers.items()}
        )
        self.target_level = {name: info.depth - 1 for name, info in teachers.items()}

    def make_student(self, run: RunConfig) -> ViT | ConvViT:  # type: ignore[override]  # one interface, two shapes
        stages = cast(MRMAEConfig, run.method).stages
        if stages is None:
            return super().make_student(run)
        return ConvViT(run.student, stages, run.data.image_size, checkpoint_every=run.engine.activation_checkpointing)

    def fused(self, out: ViTOutput | ConvViTOutput) -> Tensor:
        """What the mimic heads read: [B, T, D] without the class token, unless it is a target."""
        tokens = out.tokens
        if self.fusion_norm is not None:
            levels = [out.levels[level] for level in self.config.levels]
            early = out.early if isinstance(out, ConvViTOutput) else None
            levels = levels if early is None else [early, *levels]
            mixed = torch.stack(levels).sum(dim=0) if self.fusion is None else self.fusion(levels).tokens
            tokens = self.fusion_norm(mixed)
        return tokens if self.config.cls_target else tokens[:, self.student.prefix :]

    def mimic_target(self, targets: Targets, level: int, ids_keep_BK: Tensor) -> Tensor:
        """Normalised teacher features at the visible patches, class token first if a target: float32 [B, T, C]."""
        features = gather_tokens(targets.levels[level], ids_keep_BK)
        if self.config.cls_target:
            features = torch.cat([targets.cls[level][:, None], features], dim=1)
        return normalise_features(features, self.config.target_norm)

    def forward(self, batch: Batch, targets: Mapping[str, Targets]) -> dict[str, Tensor]:
        """Scalars: loss, and before their weights pixel and mimic_<teacher>."""
        masks = self.masking.choose(batch, targets)
        raster = in_raster_order(masks)
        out = self.student(batch.images, masks.visible, batch.noise.get("drop_path"), self.config.levels)
        pred = self.decoder(out.tokens, raster)
        pixel = mae.masked_patch_loss(pred, raster.of(self.target(batch.images)), raster.mask)
        fused = self.fused(out)
        mimic = {
            name: feature_loss(
                head(fused), self.mimic_target(targets[name], level, masks.visible), self.config.mimic_loss
            )
            for (name, head), level in zip(self.mimic.items(), self.target_level.values(), strict=True)
        }
        weighted = [self.config.teacher_weights.get(name, 1.0) * loss for name, loss in mimic.items()]
        loss = torch.stack([self.config.pixel_weight * pixel, *weighted]).sum()
        return {"loss": loss, "pixel": pixel.detach(), **{f"mimic_{n}": value.detach() for n, value in mimic.items()}}
