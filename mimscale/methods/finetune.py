"""Fine-tuning: supervised classification of unmasked images (He et al. 2022, arXiv 2111.06377, app. A.1).

The encoder is a plain ViT, ConvMAE's or SimMIM's; cross-entropy with label smoothing. Position embeddings are learned.
The demo trains its teacher with this method.

Differences from the release: no mixup, cutmix, RandAugment and random erasing, which its published accuracies need.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol, cast

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mimscale.config.base import Fraction, Strict
from mimscale.config.registry import MethodConfig
from mimscale.config.run import RunConfig
from mimscale.errors import UserError
from mimscale.methods import base
from mimscale.models.beit import LAYER_SCALE, Beit, Positions
from mimscale.models.convvit import ConvStages, ConvViT, check_stages
from mimscale.models.layer_order import convvit_layer_of, vit_layer_of
from mimscale.models.vit import LN_EPS, ViT, set_fused_residuals
from mimscale.types import Batch, Needs, Noise, Targets, TeacherInfo


class BeitConfig(Strict):
    """SimMIM's ViT. positions: a relative bias per block, initialised with a copy of the bias that all blocks shared in
    pre-training, as released (per_block); the shared bias (relative); or a learned table (absolute). layer_scale:
    initial value, null: none.
    """

    positions: Positions = "per_block"
    layer_scale: float | None = Field(LAYER_SCALE, gt=0, le=1e3)


class FinetuneConfig(MethodConfig):
    """pool: mean of the patch tokens and a new LayerNorm, or the class token after the encoder's final norm.

    stages: ConvMAE's convolution stages before the ViT, without the fusion of pre-training. beit: SimMIM's ViT.
    Neither: a plain ViT.
    """

    classes: int = Field(ge=2, le=10**6)
    stages: ConvStages | None = None
    beit: BeitConfig | None = None
    pool: Literal["mean", "cls"] = "mean"
    label_smoothing: Fraction = 0.1
    head_std: float = Field(2e-5, gt=0, le=10)


class Classifier(nn.Linear):
    """[B, D] -> [B, classes]; truncated-normal weight with this std, zero bias."""

    def __init__(self, width: int, classes: int, std: float) -> None:
        super().__init__(width, classes)
        nn.init.trunc_normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)


class Finetune(base.Method):
    """`student`, `fc_norm` (only if pool = mean) and `head`, with timm's names (ConvMAE's if `stages` is set)."""

    Config = FinetuneConfig
    student: ViT | ConvViT | Beit

    @classmethod
    def check(cls, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        if teachers:
            raise UserError(f"teachers.{next(iter(teachers))}: finetune uses no teacher; remove the section teachers")
        config = cast(FinetuneConfig, run.method)
        check_encoder(config, run)

    @classmethod
    def check_classes(cls, run: RunConfig, classes: int) -> None:
        outputs = cast(FinetuneConfig, run.method).classes
        if outputs != classes:
            raise UserError(
                f"method.classes = {outputs}, but {run.data.shards} has {classes} classes; set method.classes={classes}"
            )

    def __init__(self, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        super().__init__(run, teachers)
        self.config = config = cast(FinetuneConfig, run.method)
        mean = config.pool == "mean"
        self.student = make_encoder(run, config, final_norm=not mean)
        set_fused_residuals(self.student, run.engine.uses("fused_residual"))
        self.fc_norm = nn.LayerNorm(run.student.width, eps=LN_EPS) if mean else nn.Identity()
        self.head = Classifier(run.student.width, config.classes, config.head_std)
        noise = {"drop_path": Noise("uniform", (self.student.depth, 2))} if run.student.drop_path else {}
        self.needs = Needs(noise=noise, labels=True)

    def features(self, images_B3HW: Tensor, drop_noise: Tensor | None = None) -> Tensor:
        """Input of the head: [B, D]."""
        tokens = self.student(images_B3HW, drop_noise=drop_noise).tokens
        return self.fc_norm(
            tokens[:, self.student.prefix :].mean(dim=1) if self.config.pool == "mean" else tokens[:, 0]
        )

    def forward(self, batch: Batch, targets: Mapping[str, Targets]) -> dict[str, Tensor]:
        """Scalars: loss, and top1, the accuracy on the micro-batch."""
        assert batch.labels is not None
        logits = self.head(self.features(batch.images, batch.noise.get("drop_path"))).float()
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.config.label_smoothing)
        return {"loss": loss, "top1": (logits.argmax(dim=1) == batch.labels).float().mean()}

    @property
    def notes(self) -> list[str]:
        return [base.residual_note(self.student)]

    def no_weight_decay(self) -> set[str]:
        return {"student.pos_embed", "student.cls_token"}

    def layer_of(self, name: str) -> int:
        order = vit_layer_of if self.config.stages is None else convvit_layer_of
        return order(name.removeprefix("student."), self.student.config.depth)


class EncoderChoice(Protocol):
    """What a classifier's section says of its encoder."""

    stages: ConvStages | None
    beit: BeitConfig | None
    pool: Literal["mean", "cls"]


def check_encoder(config: EncoderChoice, run: RunConfig) -> None:
    """Raises UserError where the section names two kinds of encoder, or one without the class token that it pools."""
    if config.stages is not None and config.beit is not None:
        raise UserError("method.stages and method.beit are two kinds of encoder; set one of them to null")
    if config.stages is not None:
        check_stages(config.stages, run.student)
        if config.pool == "cls" and not config.stages.class_token:
            raise UserError("method.pool = cls, but stages.class_token is false; set method.pool = mean")


def make_encoder(run: RunConfig, config: EncoderChoice, final_norm: bool) -> ViT | ConvViT | Beit:
    """The encoder under a classifier's head, with learned positions."""
    size, every, stages = run.data.image_size, run.engine.activation_checkpointing, config.stages
    if config.beit is not None:
        positions, scale = config.beit.positions, config.beit.layer_scale
        return Beit(
            run.student, size, positions=positions, layer_scale=scale, final_norm=final_norm, recompute_every=every
        )
    if stages is None:
        return ViT(run.student, size, final_norm=final_norm, learned_pos=True, recompute_every=every)
    return ConvViT(
        run.student,
        stages,
        size,
        fusion=False,
        final_norm=final_norm,
        learned_pos=True,
        recompute_every=every,
    )
