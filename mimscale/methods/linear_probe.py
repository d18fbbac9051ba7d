"""MAE's linear probe: a classifier on a frozen encoder (He et al. 2022, arXiv 2111.06377, app. A.1; main_linprobe.py).

BatchNorm without parameters (eps 1e-6), then a linear layer, on the class token after the encoder's last norm. With
`pool: mean` the input is the mean of the patch tokens before that norm, normalised by `fc_norm`, as the release does
with --global_pool; `fc_norm` is not trained, so its weight is 1 and its bias 0.

Differences from the release: there each process takes the statistics of its own micro-batch, 512 images as published,
and a checkpoint keeps those of process 0. Here they are of `norm_batch` images that follow each other in the global
batch, on whatever ranks these are, so that ranks and micro-batch change nothing; all groups move the running values.
With one process and a micro-batch of `norm_batch` images it is the release's computation.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mimscale.config.deepspeed import load_ds_config, precision_of
from mimscale.config.registry import MethodConfig
from mimscale.config.run import RunConfig
from mimscale.errors import UserError
from mimscale.methods import base
from mimscale.methods.finetune import BeitConfig, check_encoder, make_encoder
from mimscale.models.convvit import ConvStages
from mimscale.models.frozen import freeze
from mimscale.models.meta_autocast import MetaAutocast
from mimscale.models.probe_head import ProbeHead
from mimscale.models.vit import LN_EPS
from mimscale.types import Batch, Needs, Targets, TeacherInfo


class LinearProbeConfig(MethodConfig):
    """classes: number of labels. stages, beit: the kind of encoder, as in finetune. pool: class token, or mean of the
    patch tokens.

    norm_batch: images over which BatchNorm takes its statistics; at most the global batch, which holds a whole number
    of them. encoder_precision: of the encoder's forward pass; the head computes in fp32.
    head_std: standard deviation of the head's weights at the start.
    """

    classes: int = Field(ge=2, le=10**6)
    stages: ConvStages | None = None
    beit: BeitConfig | None = None
    pool: Literal["cls", "mean"] = "cls"
    norm_batch: int = Field(512, ge=2, le=2**24)
    head_std: float = Field(0.01, gt=0, le=10)
    encoder_precision: Literal["fp32", "bf16"] = "fp32"


class LinearProbe(base.Method):
    """`student` and `fc_norm` (only if pool = mean) are frozen; `head.1` is trained, `head.0` keeps statistics."""

    Config = LinearProbeConfig

    @classmethod
    def check(cls, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        if teachers:
            raise UserError(
                f"teachers.{next(iter(teachers))}: linear_probe has no teacher; remove the section teachers"
            )
        config = cast(LinearProbeConfig, run.method)
        check_encoder(config, run)
        if run.student.drop_path:
            raise UserError(
                f"student.drop_path = {run.student.drop_path:g}: a frozen encoder drops nothing; set it to 0"
            )
        if run.ema is not None:
            raise UserError("ema averages the student, which linear_probe does not train; set ema=null")
        if run.engine.backend == "deepspeed" and precision_of(load_ds_config(run.engine.ds_config)) != "fp32":
            raise UserError(
                f"engine.ds_config = {run.engine.ds_config}: linear_probe trains its head in fp32; use zero0_fp32 and "
                f"method.encoder_precision = bf16"
            )
        if run.schedule.global_batch % norm_batch(run):
            raise UserError(
                f"method.norm_batch = {config.norm_batch} does not divide schedule.global_batch = "
                f"{run.schedule.global_batch}; BatchNorm takes its statistics over whole groups of that many images"
            )

    @classmethod
    def check_classes(cls, run: RunConfig, classes: int) -> None:
        outputs = cast(LinearProbeConfig, run.method).classes
        if outputs != classes:
            raise UserError(
                f"method.classes = {outputs}, but {run.data.shards} has {classes} classes; set method.classes={classes}"
            )

    @classmethod
    def check_batch(cls, run: RunConfig, images: int) -> None:
        group = norm_batch(run)
        if images % group:
            raise UserError(
                f"method.norm_batch = {group}: all ranks together pass {images} images at a time, not a multiple of "
                f"it; raise engine.max_micro_batch, or lower method.norm_batch"
            )

    def __init__(self, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        super().__init__(run, teachers)
        self.config = config = cast(LinearProbeConfig, run.method)
        self.global_batch, self.norm_batch = run.schedule.global_batch, norm_batch(run)
        mean = config.pool == "mean"
        self.student = make_encoder(run, config, final_norm=not mean)
        self.fc_norm = nn.LayerNorm(run.student.width, eps=LN_EPS) if mean else nn.Identity()
        freeze(self.student)
        freeze(self.fc_norm)
        self.head = ProbeHead(run.student.width, config.classes, config.head_std)
        self.needs = Needs(labels=True)

    @torch.no_grad()
    def features(self, images_B3HW: Tensor) -> Tensor:
        """Input of the head: float32 [B, D]."""
        half = self.config.encoder_precision == "bf16"
        with autocast(images_B3HW.device, half):
            tokens = self.student(images_B3HW).tokens
            if self.config.pool == "mean":
                tokens = self.fc_norm(tokens[:, self.student.prefix :].mean(dim=1))
            else:
                tokens = tokens[:, 0]
        return tokens.float()

    def classify(self, features_BD: Tensor, positions_B: Tensor) -> Tensor:
        """float32 [B, classes]. positions: places in the training sequence. Collective in train mode."""
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        groups = max(1, len(features_BD) * ranks // self.norm_batch)
        index = positions_B % self.global_batch // self.norm_batch % groups
        with autocast(features_BD.device, False):
            logits: Tensor = self.head(features_BD, index, groups)
        return logits

    def logits(self, images_B3HW: Tensor) -> Tensor:
        """Normalised images -> float32 [B, classes], in evaluation mode."""
        assert not self.training
        features = self.features(images_B3HW)
        with autocast(features.device, False):
            logits: Tensor = self.head(features)
        return logits

    def forward(self, batch: Batch, targets: Mapping[str, Targets]) -> dict[str, Tensor]:
        """Scalars: loss, and top1, the accuracy on the micro-batch."""
        assert batch.labels is not None
        logits = self.classify(self.features(batch.images), batch.positions)
        loss = F.cross_entropy(logits, batch.labels)
        return {"loss": loss, "top1": (logits.argmax(dim=1) == batch.labels).float().mean()}


def autocast(device: torch.device, half: bool) -> AbstractContextManager[object]:
    """bf16 or nothing, whatever is around it."""
    if device.type == "meta":
        return MetaAutocast() if half else nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


def norm_batch(run: RunConfig) -> int:
    """Images in a group of BatchNorm's statistics: `method.norm_batch`, or the global batch if that is smaller."""
    return min(cast(LinearProbeConfig, run.method).norm_batch, run.schedule.global_batch)
