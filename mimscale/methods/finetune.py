"""Fine-tuning: supervised classification of unmasked images (He et al. 2022, arXiv 2111.06377, app. A.1).

The encoder is a plain ViT, ConvMAE's or SimMIM's; cross-entropy with label smoothing, or with the soft labels of mixed
images. Position embeddings are learned. The demo trains its teacher with this method.

Differences from the release: images are mixed in pairs (see data/augment.py). RandAugment and random erasing are
settings of the section data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol, cast

import torch.nn.functional as F
from pydantic import Field, model_validator
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
from mimscale.optim.ema import STUDENT
from mimscale.types import Batch, Mixing, Needs, Noise, Targets, TeacherInfo


class BeitConfig(Strict):
    """SimMIM's ViT. positions: a relative bias per block, initialised with a copy of the bias that all blocks shared in
    pre-training, as released (per_block); the shared bias (relative); or a learned table (absolute). layer_scale:
    initial value, null: none.
    """

    positions: Positions = "per_block"
    layer_scale: float | None = Field(LAYER_SCALE, gt=0, le=1e3)


class FinetuneConfig(MethodConfig):
    """classes: number of labels. pool: mean of the patch tokens and a new LayerNorm, or the class token after the
    encoder's final norm.

    stages: ConvMAE's convolution stages before the ViT, without the fusion of pre-training. beit: SimMIM's ViT.
    Neither: a plain ViT.

    mixup, cutmix: alpha of the Beta distribution of the images' shares (Zhang et al. 2018, Yun et al. 2019); 0: off.
    mixup_prob: that a pair is mixed at all. mixup_switch: share of cutmix where both are on. label_smoothing: share of
    the target that all labels get in equal parts. head_std: standard deviation of the head's weights at the start.
    """

    classes: int = Field(ge=2, le=10**6)
    stages: ConvStages | None = None
    beit: BeitConfig | None = None
    pool: Literal["mean", "cls"] = "mean"
    label_smoothing: Fraction = 0.1
    mixup: float = Field(0.0, ge=0, le=100)
    cutmix: float = Field(0.0, ge=0, le=100)
    mixup_prob: float = Field(1.0, gt=0, le=1)
    mixup_switch: float = Field(0.5, ge=0, le=1)
    head_std: float = Field(2e-5, gt=0, le=10)

    @model_validator(mode="after")
    def _check_mixing(self) -> FinetuneConfig:
        for name, value, default in (("mixup_prob", self.mixup_prob, 1), ("mixup_switch", self.mixup_switch, 0.5)):
            if not self.mixup and not self.cutmix and value != default:
                raise ValueError(
                    f"{name} = {value:g} with mixup = cutmix = 0: nothing is mixed; set one of these above 0"
                )
        return self


class Classifier(nn.Linear):
    """[B, D] -> [B, classes]; truncated-normal weight with this std, zero bias."""

    def __init__(self, width: int, classes: int, std: float) -> None:
        super().__init__(width, classes)
        nn.init.trunc_normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)


class Finetune(base.Method):
    """`student`, `fc_norm` (only if pool = mean) and `head`, with timm's names (ConvMAE's if `stages` is set)."""

    Config = FinetuneConfig
    averaged = (STUDENT, "fc_norm.", "head.")
    student: ViT | ConvViT | Beit

    @classmethod
    def check(cls, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        if teachers:
            raise UserError(f"teachers.{next(iter(teachers))}: finetune uses no teacher; remove the section teachers")
        config = cast(FinetuneConfig, run.method)
        if (config.mixup or config.cutmix) and run.schedule.global_batch % 2:
            raise UserError(
                f"schedule.global_batch = {run.schedule.global_batch} is odd, but method.mixup and method.cutmix mix "
                f"images in pairs; take an even one, or set both to 0"
            )
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
        mixing = None
        if config.mixup or config.cutmix:
            mixing = Mixing(
                mixup=config.mixup,
                cutmix=config.cutmix,
                prob=config.mixup_prob,
                switch=config.mixup_switch,
                classes=config.classes,
                smoothing=config.label_smoothing,
            )
        self.needs = Needs(noise=noise, labels=True, mixing=mixing)

    def features(self, images_B3HW: Tensor, drop_noise: Tensor | None = None) -> Tensor:
        """Input of the head: [B, D]."""
        tokens = self.student(images_B3HW, drop_noise=drop_noise).tokens
        return self.fc_norm(
            tokens[:, self.student.prefix :].mean(dim=1) if self.config.pool == "mean" else tokens[:, 0]
        )

    def logits(self, images_B3HW: Tensor) -> Tensor:
        """Normalised images -> float32 [B, classes], without drop path."""
        return cast(Tensor, self.head(self.features(images_B3HW))).float()

    def forward(self, batch: Batch, targets: Mapping[str, Targets]) -> dict[str, Tensor]:
        """Scalars: loss, and top1, the accuracy on the micro-batch; of mixed images for the class of the larger share.

        Soft labels have their smoothing in them.
        """
        logits = self.head(self.features(batch.images, batch.noise.get("drop_path"))).float()
        if batch.soft_labels is not None:
            loss, labels = F.cross_entropy(logits, batch.soft_labels), batch.soft_labels.argmax(dim=1)
        else:
            assert batch.labels is not None
            loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.config.label_smoothing)
            labels = batch.labels
        return {"loss": loss, "top1": (logits.argmax(dim=1) == labels).float().mean()}

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

    @property
    def stages(self) -> ConvStages | None: ...
    @property
    def beit(self) -> BeitConfig | None: ...
    @property
    def pool(self) -> Literal["mean", "cls"]: ...


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
