"""MAE: masked autoencoders (He et al., CVPR 2022, arXiv 2111.06377).

Differences from the release: none in masks, network, target, loss, weight decay and learning rates. Added options: drop
path in the encoder, a low-pass target.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from mimscale.config.run import RunConfig
from mimscale.errors import UserError
from mimscale.methods import base
from mimscale.models.convvit import ConvViT, ConvViTOutput
from mimscale.models.decoder import MAEDecoder
from mimscale.models.fusion import FusionConfig, check_fusion, fuse, make_fusion
from mimscale.models.patches import unnormalised
from mimscale.models.targets import images_from_pixels, low_pass, low_pass_disc, pixel_target
from mimscale.models.token_selection import RasterOrder, raster_order
from mimscale.models.vit import ViT, ViTOutput
from mimscale.types import Batch, Masks, Targets, TeacherInfo, View

TOKENS = {"student.cls_token", "decoder.mask_token"}  # with weight decay in MAE, without in OpenMMLab's methods


class MAEConfig(base.MaskedConfig):
    """norm_pix_loss: normalise the pixels of each target patch, as in the published ImageNet recipes.

    low_pass_radius: regress the image's low frequencies, up to this many cycles per side (PixMIM); null: the unfiltered
    image. fusion: the decoder's input: the last block of the encoder, or several blocks fused (MFF).
    decoder_width: channels of the decoder. decoder_depth: its blocks. decoder_heads: attention heads of each.
    decoder_mlp_ratio: hidden channels of its MLPs as a multiple of its width.
    """

    norm_pix_loss: bool = True
    low_pass_radius: float | None = Field(None, gt=0, le=1e4)
    fusion: FusionConfig = FusionConfig()
    decoder_width: int = Field(512, ge=4, le=2**16)
    decoder_depth: int = Field(8, ge=1, le=1024)
    decoder_heads: int = Field(16, ge=1, le=2**12)
    decoder_mlp_ratio: float = Field(4.0, gt=0, le=256)

    @model_validator(mode="after")
    def _divisible(self) -> MAEConfig:
        if self.decoder_width % self.decoder_heads or self.decoder_width % 4:
            rule = f"must be divisible by decoder_heads = {self.decoder_heads} and by 4"
            raise ValueError(f"decoder_width = {self.decoder_width} {rule}")
        if int(self.decoder_width * self.decoder_mlp_ratio) < 1:
            rule = f"of decoder_width = {self.decoder_width} is less than one channel; raise it"
            raise ValueError(f"decoder_mlp_ratio = {self.decoder_mlp_ratio} {rule}")
        return self


class Encoded(NamedTuple):
    """latent: [B, prefix + K, D], input of the decoder. fused: the same shape, input of other heads (MR-MAE's).
    scalars: for the log, weight_<block> or weight_stages, the weight of each fused level.
    """

    latent: Tensor
    fused: Tensor
    scalars: dict[str, Tensor]


class Prediction(NamedTuple):
    """pred: [B, S, p*p*3], predicted pixels of the patches in `raster`, in the parameters' dtype. scalars: for the
    log.
    """

    pred: Tensor
    raster: RasterOrder
    scalars: dict[str, Tensor]


def masked_patch_loss(pred_BSP: Tensor, target_BSP: Tensor, mask_BS: Tensor) -> Tensor:
    """Mean squared error per patch, averaged over the masked patches of the batch (sec. 3). fp32 scalar."""
    per_patch = (pred_BSP.float() - target_BSP).square().mean(dim=-1)
    return (per_patch * mask_BS).sum() / mask_BS.sum()


class MAE(base.MaskedMethod):
    """`student` encodes the visible patches, `decoder` predicts visible and masked ones; the loss is on the masked."""

    Config = MAEConfig
    student: ViT | ConvViT

    @classmethod
    def check(cls, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        config = cast(MAEConfig, run.method)
        if config.low_pass_radius is not None:
            side = run.data.image_size
            disc = low_pass_disc((side, side), config.low_pass_radius, torch.device("cpu"))
            passed = int(disc.sum())
            if not 0 < passed < disc.numel():
                raise UserError(
                    f"method.low_pass_radius = {config.low_pass_radius} passes {passed} of {disc.numel()} frequencies "
                    f"at {side} px; choose one between 1 and {side // 2}"
                )
        check_fusion(config.fusion, run.student.depth)
        super().check(run, teachers)

    def __init__(self, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        super().__init__(run, teachers)
        self.config = config = cast(MAEConfig, run.method)
        self.masked_only = run.engine.uses("masked_decoder")
        self.decoder = MAEDecoder(
            in_width=run.student.width,
            width=config.decoder_width,
            depth=config.decoder_depth,
            heads=config.decoder_heads,
            mlp_ratio=config.decoder_mlp_ratio,
            patch=run.student.patch,
            grid=run.grid,
            prefix=self.student.prefix,
            recompute_every=run.engine.activation_checkpointing,
        )
        self.fusion = make_fusion(config.fusion, run.student.width, isinstance(self.student, ConvViT))

    @property
    def notes(self) -> list[str]:
        return [base.masked_note(self.masked_only, self.masking), *super().notes]

    def make_student(self, run: RunConfig) -> ViT | ConvViT:
        """Build the encoder."""
        return ViT(run.student, run.data.image_size, recompute_every=run.engine.activation_checkpointing)

    def target_images(self, images_B3HW: Tensor) -> Tensor:
        """The images whose pixels are regressed."""
        radius = self.config.low_pass_radius
        return images_B3HW if radius is None else low_pass(images_B3HW, radius)

    def target(self, images_B3HW: Tensor, ids_BK: Tensor | None = None) -> Tensor:
        """Pixels of every patch, float32 [B, L, p*p*3], or of those at `ids`, [B, K, p*p*3], normalised per patch if
        the config says so.
        """
        images, patch = self.target_images(images_B3HW), self.student.config.patch
        return pixel_target(images, patch, self.config.norm_pix_loss, ids_BK)

    def encode(self, batch: Batch, visible_BK: Tensor) -> Encoded:
        """Features of the visible patches: of the last block or fused, after the final norm."""
        inputs, levels = (batch.images, visible_BK, batch.noise.get("drop_path")), self.config.fusion.levels
        if self.fusion is None:
            tokens = self.student(*inputs).tokens
            return Encoded(tokens, tokens, {})
        tokens, scalars = self.fuse_levels(self.student(*inputs, levels, apply_norm=False))
        fused = self.student.norm(tokens)
        return Encoded(fused, fused, scalars)

    def fuse_levels(self, out: ViTOutput | ConvViTOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """(fused levels [B, prefix + K, D] before any norm, their weights for the log)."""
        assert self.fusion is not None
        levels = {str(level): out.levels[level] for level in self.config.fusion.levels}
        if isinstance(out, ConvViTOutput) and out.stage_outputs is not None:
            levels = {"stages": out.stage_outputs, **levels}
        return fuse(self.fusion, levels)

    def predict(self, batch: Batch, targets: Mapping[str, Targets]) -> Prediction:
        """Encode the visible patches and predict the pixels of the visible and the masked ones."""
        masks = self.masking.choose(batch, targets)
        raster = raster_order(masks)
        encoded = self.encode(batch, masks.visible)
        return Prediction(self.decoder(encoded.latent, raster), raster, encoded.scalars)

    def pixel_loss(self, latent_BTD: Tensor, masks: Masks, images_B3HW: Tensor) -> Tensor:
        """Decode and compare with the target: `masked_patch_loss`. If `masked_only`, the decoder's last layers, the
        target and the loss skip what that would multiply by zero.
        """
        if self.masked_only:
            return F.mse_loss(self.decoder(latent_BTD, masks).float(), self.target(images_B3HW, masks.masked))
        raster = raster_order(masks)
        target = raster.gather(self.target(images_B3HW))
        return masked_patch_loss(self.decoder(latent_BTD, raster), target, raster.mask)

    def forward(self, batch: Batch, targets: Mapping[str, Targets]) -> dict[str, Tensor]:
        masks = self.masking.choose(batch, targets)
        encoded = self.encode(batch, masks.visible)
        return {"loss": self.pixel_loss(encoded.latent, masks, batch.images), **encoded.scalars}

    def reconstruct(self, pred_BLP: Tensor, images_B3HW: Tensor) -> Tensor:
        """Predictions of all patches -> float32 images [B, 3, H, W], clamped to 0..1.

        With norm_pix_loss the prediction holds no mean and contrast of a patch; these are taken from the target image.
        So the colour and brightness of a patch say nothing about the model.
        """
        target = self.target_images(images_B3HW)
        return unnormalised(
            images_from_pixels(pred_BLP, target, self.student.config.patch, normalised=self.config.norm_pix_loss)
        )

    @torch.no_grad()
    def view(self, batch: Batch, targets: Mapping[str, Targets]) -> View:
        """Images, mask, importance and reconstruction (see `reconstruct`)."""
        pred, raster, _ = self.predict(base.without_drop_path(batch), targets)
        reconstruction = self.reconstruct(raster.scatter(pred, self.student.patches), batch.images)
        return self.make_view(batch, targets, raster, reconstruction)
