"""SimMIM: mask tokens in the encoder, a linear head, raw pixels (Xie et al., CVPR 2022, arXiv 2111.09886).

Differences to the release: the ViT only, not the Swin; the learning rate is the configured one under gradient
accumulation as well, where theirs is multiplied by the number of accumulation steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from pydantic import Field
from torch import Tensor

from mimscale.config import Fraction, MethodConfig, RunConfig
from mimscale.contracts import Batch, Needs, Noise, Targets, TeacherInfo, View
from mimscale.errors import UserError
from mimscale.methods import base
from mimscale.models.beit import LAYER_SCALE, Beit, Positions
from mimscale.models.masking import masked_units, random_order, unit_mask
from mimscale.models.patches import assemble, cut, unnormalised
from mimscale.models.pixel_head import PixelHead

LOSS_EPS = 1e-5


class SimMIMConfig(MethodConfig):
    """mask_unit: side in pixels of the squares that are masked as one.

    positions: one relative bias for all blocks, or a learned table. layer_scale: its start, null for none.
    """

    mask_ratio: Fraction = 0.6
    mask_unit: int = Field(32, ge=1)
    positions: Positions = "relative"
    layer_scale: float | None = Field(LAYER_SCALE, gt=0)


class Prediction(NamedTuple):
    """pred: [B, L, 3, p, p] in raster order, in the parameters' type. mask: float32 [B, L], 1 = masked."""

    pred: Tensor
    mask: Tensor


def masked_pixel_loss(pred_BLCpp: Tensor, target_BLCpp: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean absolute error over the pixels and channels of the masked patches of the batch. fp32 scalar.

    As released, 1e-5 is added to the number of masked pixels.
    """
    channels, height, width = pred_BLCpp.shape[2:]
    per_patch = (pred_BLCpp.float() - target_BLCpp.float()).abs().sum(dim=(2, 3, 4))
    return (per_patch * mask_BL).sum() / (mask_BL.sum() * height * width + LOSS_EPS) / channels


class SimMIM(base.Method):
    """`student` sees all patches, the masked ones as mask tokens; `head` predicts pixels; the loss reads the masked."""

    Config = SimMIMConfig

    @classmethod
    def check(cls, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        config, patch, size = cast(SimMIMConfig, run.method), run.student.patch, run.data.image_size
        if config.mask_unit % patch or size % config.mask_unit:
            raise UserError(
                f"method.mask_unit = {config.mask_unit} must be a multiple of student.patch = {patch} and divide "
                f"data.image_size = {size}; {patch} always fits"
            )
        units = (size // config.mask_unit) ** 2
        masked = masked_units(units, config.mask_ratio)
        if not 0 < masked < units:
            raise UserError(
                f"method.mask_ratio = {config.mask_ratio} masks {masked} of {units} units of {config.mask_unit} px; "
                "choose a ratio that masks at least one and leaves at least one"
            )
        if teachers:
            raise UserError(
                f"teachers.{next(iter(teachers))}: {config.name} reads no teacher; remove the section teachers"
            )

    def __init__(self, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        super().__init__(run, teachers)
        self.config = config = cast(SimMIMConfig, run.method)
        self.student: Beit = Beit(
            run.student,
            run.data.image_size,
            positions=config.positions,
            layer_scale=config.layer_scale,
            mask_token=True,
            checkpoint_every=run.engine.activation_checkpointing,
        )
        self.head = PixelHead(run.student.width, run.student.patch)
        self.factor = config.mask_unit // run.student.patch
        self.unit_grid = (run.grid[0] // self.factor, run.grid[1] // self.factor)
        units = self.unit_grid[0] * self.unit_grid[1]
        self.masked = masked_units(units, config.mask_ratio)
        noise = {"mask": Noise("uniform", (units,))}
        if run.student.drop_path:
            noise["drop_path"] = Noise("uniform", (self.student.depth, 2))
        self.needs = Needs(noise=noise)

    def mask(self, noise_BU: Tensor) -> Tensor:
        """float32 [B, L] in raster order, 1 = masked: whole units, in the order of the noise."""
        return unit_mask(random_order(noise_BU), self.masked, self.unit_grid, self.factor)

    def predict(self, batch: Batch) -> Prediction:
        """Predict the pixels of all patches."""
        mask = self.mask(batch.noise["mask"])
        tokens = self.student(batch.images, mask, batch.noise.get("drop_path")).tokens
        return Prediction(self.head(tokens[:, 1:]), mask)

    def forward(self, batch: Batch, targets: Mapping[str, Targets]) -> dict[str, Tensor]:
        pred, mask = self.predict(batch)
        return {"loss": masked_pixel_loss(pred, cut(batch.images, self.student.config.patch), mask)}

    @torch.no_grad()
    def view(self, batch: Batch, targets: Mapping[str, Targets]) -> View:
        """The images, the mask, and every patch as predicted."""
        pred, mask = self.predict(replace(batch, noise={"mask": batch.noise["mask"]}))
        return View(unnormalised(batch.images), mask, unnormalised(assemble(pred, self.student.grid)))

    def no_weight_decay(self) -> set[str]:
        """The mask token and the table of the relative bias are decayed, as released."""
        return {"student.cls_token", "student.pos_embed"}
