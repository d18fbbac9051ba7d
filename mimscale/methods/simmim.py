"""SimMIM: mask tokens in the encoder, a linear head, raw pixels (Xie et al., CVPR 2022, arXiv 2111.09886).

Differences from the release: the ViT only, not the Swin; gradient accumulation does not change the learning rate, in
the release it is multiplied by the number of accumulation steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mimscale.config.run import RunConfig
from mimscale.methods import base
from mimscale.models.beit import LAYER_SCALE, Beit, Positions
from mimscale.models.fusion import FusionConfig, check_fusion, fuse, make_fusion
from mimscale.models.patches import patches_at, patchify, unnormalised, unpatchify
from mimscale.models.pixel_head import PixelHead
from mimscale.models.token_selection import RasterOrder, gather_tokens, raster_order
from mimscale.types import Batch, Masks, Targets, TeacherInfo, View

LOSS_EPS = 1e-5


class SimMIMConfig(base.MaskedConfig):
    """masking: 0.6 of the squares of 32 pixels, uniform, as released.

    fusion: the head's input: the last block, or several blocks fused (ours).
    positions: a relative bias shared by all blocks, one per block, or a learned table. layer_scale: initial value,
        null: none.
    """

    masking: base.AnyMasking = base.masking_default("random", 0.6, unit=32)
    fusion: FusionConfig = FusionConfig()
    positions: Positions = "relative"
    layer_scale: float | None = Field(LAYER_SCALE, gt=0, le=1e3)


class Prediction(NamedTuple):
    """pred: predicted pixels of the patches in `raster`, [B, S, 3, p, p], or of the masked ones, [B, M, 3, p, p], in
    the parameters' dtype. scalars: for the log.
    """

    pred: Tensor
    raster: RasterOrder
    scalars: dict[str, Tensor]


def masked_pixel_loss(pred_BSCpp: Tensor, target_BSCpp: Tensor, mask_BS: Tensor) -> Tensor:
    """Mean absolute error over the pixels and channels of the masked patches of the batch. fp32 scalar.

    As released, 1e-5 is added to the number of masked pixels.
    """
    channels, height, width = pred_BSCpp.shape[2:]
    per_patch = (pred_BSCpp.float() - target_BSCpp.float()).abs().sum(dim=(2, 3, 4))
    return (per_patch * mask_BS).sum() / (mask_BS.sum() * height * width + LOSS_EPS) / channels


class SimMIM(base.MaskedMethod):
    """`student` encodes visible patches and mask tokens, `head` predicts pixels; the loss is on the masked patches."""

    Config = SimMIMConfig
    student: Beit

    @classmethod
    def check(cls, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        check_fusion(cast(SimMIMConfig, run.method).fusion, run.student.depth)
        super().check(run, teachers)

    def __init__(self, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        super().__init__(run, teachers)
        self.config = config = cast(SimMIMConfig, run.method)
        self.masked_only = run.engine.uses("masked_decoder")
        self.head = PixelHead(run.student.width, run.student.patch)
        self.fusion = make_fusion(config.fusion, run.student.width)

    @property
    def notes(self) -> list[str]:
        return [base.masked_note(self.masked_only, self.masking), *super().notes]

    def make_student(self, run: RunConfig) -> Beit:
        config = cast(SimMIMConfig, run.method)
        return Beit(
            run.student,
            run.data.image_size,
            positions=config.positions,
            layer_scale=config.layer_scale,
            mask_token=True,
            recompute_every=run.engine.activation_checkpointing,
        )

    def predict(self, batch: Batch, targets: Mapping[str, Targets]) -> Prediction:
        """Predict the pixels of the visible and the masked patches."""
        return self._predict(batch, self.masking.choose(batch, targets), masked_only=False)

    def _predict(self, batch: Batch, masks: Masks, masked_only: bool) -> Prediction:
        """masked_only: after its attention the last block computes the masked patches only, in the order of `masks`."""
        raster = raster_order(masks)
        patches = self.student.patches
        whole = raster.ids.shape[1] == patches
        inputs = (batch.images, raster.scatter(raster.mask, patches), batch.noise.get("drop_path"))
        ids, levels, only = None if whole else raster.ids, self.config.fusion.levels, None
        if masked_only:
            places = masks.masked if whole else raster.ids_restore.argsort(dim=1)[:, masks.visible.shape[1] :]
            only = places + self.student.prefix
        scalars: dict[str, Tensor] = {}
        if self.fusion is None:
            tokens = self.student(*inputs, ids, only_BM=only).tokens
        else:
            out = self.student(*inputs, ids, levels, apply_norm=False)
            tokens, scalars = fuse(self.fusion, {str(level): out.levels[level] for level in levels})
            tokens = self.student.norm(tokens if only is None else gather_tokens(tokens, only))
        return Prediction(self.head(tokens if masked_only else tokens[:, self.student.prefix :]), raster, scalars)

    def forward(self, batch: Batch, targets: Mapping[str, Targets]) -> dict[str, Tensor]:
        masks = self.masking.choose(batch, targets)
        pred, raster, scalars = self._predict(batch, masks, self.masked_only)
        patch = self.student.config.patch
        if self.masked_only:
            difference = F.l1_loss(pred.float(), patches_at(batch.images.float(), patch, masks.masked), reduction="sum")
            loss = difference / (masks.masked.numel() * patch**2 + LOSS_EPS) / 3
        else:
            loss = masked_pixel_loss(pred, raster.gather(patchify(batch.images, patch)), raster.mask)
        return {"loss": loss, **scalars}

    @torch.no_grad()
    def view(self, batch: Batch, targets: Mapping[str, Targets]) -> View:
        """Images, mask, importance and reconstruction."""
        pred, raster, _ = self.predict(base.without_drop_path(batch), targets)
        reconstruction = unpatchify(raster.scatter(pred, self.student.patches), self.student.grid)
        return self.make_view(batch, targets, raster, unnormalised(reconstruction))

    def no_weight_decay(self) -> set[str]:
        """As released: the mask token and the relative position biases have weight decay."""
        return {"student.cls_token", "student.pos_embed"}
