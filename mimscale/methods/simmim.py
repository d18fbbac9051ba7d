"""SimMIM: mask tokens in the encoder, a linear head, raw pixels (Xie et al., CVPR 2022, arXiv 2111.09886).

Differences from the release: the ViT only, not the Swin; gradient accumulation does not change the learning rate, in
the release it is multiplied by the number of accumulation steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from pydantic import Field
from torch import Tensor

from mimscale.config.run import RunConfig
from mimscale.methods import base
from mimscale.models.beit import LAYER_SCALE, Beit, Positions
from mimscale.models.fusion import FusionConfig, check_fusion, fuse, make_fusion
from mimscale.models.patches import patchify, unnormalised, unpatchify
from mimscale.models.pixel_head import PixelHead
from mimscale.models.token_selection import RasterOrder, raster_order
from mimscale.types import Batch, Targets, TeacherInfo, View

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
    """pred: [B, S, 3, p, p], predicted pixels of the patches in `raster`, in the parameters' dtype. scalars: for the
    log.
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
        self.head = PixelHead(run.student.width, run.student.patch)
        self.fusion = make_fusion(config.fusion, run.student.width)

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
        raster = raster_order(self.masking.choose(batch, targets))
        patches = self.student.patches
        ids = None if raster.ids.shape[1] == patches else raster.ids
        mask = raster.scatter(raster.mask, patches)
        inputs, levels = (batch.images, mask, batch.noise.get("drop_path"), ids), self.config.fusion.levels
        tokens, out_levels, _ = self.student(*inputs, levels, apply_norm=self.fusion is None)
        scalars: dict[str, Tensor] = {}
        if self.fusion is not None:
            tokens, scalars = fuse(self.fusion, {str(level): out_levels[level] for level in levels})
            tokens = self.student.norm(tokens)
        return Prediction(self.head(tokens[:, 1:]), raster, scalars)

    def forward(self, batch: Batch, targets: Mapping[str, Targets]) -> dict[str, Tensor]:
        pred, raster, scalars = self.predict(batch, targets)
        target = raster.gather(patchify(batch.images, self.student.config.patch))
        return {"loss": masked_pixel_loss(pred, target, raster.mask), **scalars}

    @torch.no_grad()
    def view(self, batch: Batch, targets: Mapping[str, Targets]) -> View:
        """Images, mask, importance and reconstruction."""
        pred, raster, _ = self.predict(base.without_drop_path(batch), targets)
        reconstruction = unpatchify(raster.scatter(pred, self.student.patches), self.student.grid)
        return self.make_view(batch, targets, raster, unnormalised(reconstruction))

    def no_weight_decay(self) -> set[str]:
        """As released: the mask token and the relative position biases have weight decay."""
        return {"student.cls_token", "student.pos_embed"}
