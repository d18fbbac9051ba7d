"""MAE: masked autoencoders (He et al., CVPR 2022, arXiv 2111.06377).

Differences to the release: none in masks, network, target, loss, weight decay and learning rates. Drop path in the
encoder and a low-pass target are options that it lacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mimscale.config.run import RunConfig
from mimscale.errors import UserError
from mimscale.methods import base
from mimscale.models.convvit import ConvViT, ConvViTOutput
from mimscale.models.decoder import MAEDecoder
from mimscale.models.fusion import FusionConfig, check_fusion, combined, make_fusion
from mimscale.models.patches import unnormalised
from mimscale.models.targets import images_of_pixels, low_pass, low_pass_disc, pixel_target
from mimscale.models.token_selection import Raster, in_raster_order
from mimscale.models.vit import ViT, ViTOutput
from mimscale.types import Batch, Targets, TeacherInfo, View

TOKENS = {"student.cls_token", "decoder.mask_token"}  # decayed by MAE itself, exempt in OpenMMLab's methods


class MAEConfig(base.MaskedConfig):
    """norm_pix_loss: normalise the pixels of each target patch (the published ImageNet recipes do).

    low_pass_radius: regress the image's low frequencies, up to so many cycles per side (PixMIM); null: the image as is.
    fusion: what the decoder reads of the encoder: its last block, or several combined (MFF).
    """

    norm_pix_loss: bool = True
    low_pass_radius: float | None = Field(None, gt=0)
    fusion: FusionConfig = FusionConfig()
    decoder_width: int = Field(512, ge=4)
    decoder_depth: int = Field(8, ge=1)
    decoder_heads: int = Field(16, ge=1)
    decoder_mlp_ratio: float = Field(4.0, gt=0)

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
    """latent: [B, prefix + K, D], what the decoder reads of the visible patches. fused: the same shape, what else reads
    the encoder. scalars: for the log, weight_<block> or weight_stages, the share of each level of a fusion.
    """

    latent: Tensor
    fused: Tensor
    scalars: dict[str, Tensor]


class Prediction(NamedTuple):
    """pred: [B, S, p*p*3] of the patches of `raster`, in the parameters' type. scalars: for the log."""

    pred: Tensor
    raster: Raster
    scalars: dict[str, Tensor]


def masked_patch_loss(pred_BSP: Tensor, target_BSP: Tensor, mask_BS: Tensor) -> Tensor:
    """Mean squared error per patch, averaged over the masked patches of the batch (sec. 3). fp32 scalar."""
    per_patch = (pred_BSP.float() - target_BSP).square().mean(dim=-1)
    return (per_patch * mask_BS).sum() / mask_BS.sum()


class MAE(base.MaskedMethod):
    """`student` sees the visible patches, `decoder` predicts those and the masked; the loss reads the masked."""

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
        self.decoder = MAEDecoder(
            in_width=run.student.width,
            width=config.decoder_width,
            depth=config.decoder_depth,
            heads=config.decoder_heads,
            mlp_ratio=config.decoder_mlp_ratio,
            patch=run.student.patch,
            grid=run.grid,
            prefix=self.student.prefix,
            checkpoint_every=run.engine.activation_checkpointing,
        )
        self.fusion = make_fusion(config.fusion, run.student.width, isinstance(self.student, ConvViT))

    def make_student(self, run: RunConfig) -> ViT | ConvViT:
        """The encoder; with `prefix` tokens before those of the patches."""
        return ViT(run.student, run.data.image_size, checkpoint_every=run.engine.activation_checkpointing)

    def target_images(self, images_B3HW: Tensor) -> Tensor:
        """The images whose pixels are regressed."""
        radius = self.config.low_pass_radius
        return images_B3HW if radius is None else low_pass(images_B3HW, radius)

    def target(self, images_B3HW: Tensor) -> Tensor:
        """Pixels of every patch, float32 [B, L, p*p*3], normalised per patch if the config says so."""
        return pixel_target(
            self.target_images(images_B3HW), self.student.config.patch, normalise=self.config.norm_pix_loss
        )

    def encode(self, batch: Batch, visible_BK: Tensor) -> Encoded:
        """The student's features of the visible patches, of its last block or fused, after its last norm."""
        seen, levels = (batch.images, visible_BK, batch.noise.get("drop_path")), self.config.fusion.levels
        if self.fusion is None:
            tokens = self.student(*seen).tokens
            return Encoded(tokens, tokens, {})
        mixed, scalars = self.mixed(self.student(*seen, levels, apply_norm=False))
        fused = self.student.norm(mixed)
        return Encoded(fused, fused, scalars)

    def mixed(self, out: ViTOutput | ConvViTOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """The levels of the fusion combined, [B, prefix + K, D], without a norm, and their shares."""
        assert self.fusion is not None
        levels = {str(level): out.levels[level] for level in self.config.fusion.levels}
        if isinstance(out, ConvViTOutput) and out.early is not None:
            levels = {"stages": out.early, **levels}
        return combined(self.fusion, levels)

    def predict(self, batch: Batch, targets: Mapping[str, Targets]) -> Prediction:
        """Encode the visible patches and predict the pixels of all but the thrown."""
        masks = self.masking.choose(batch, targets)
        raster = in_raster_order(masks)
        encoded = self.encode(batch, masks.visible)
        return Prediction(self.decoder(encoded.latent, raster), raster, encoded.scalars)

    def forward(self, batch: Batch, targets: Mapping[str, Targets]) -> dict[str, Tensor]:
        pred, raster, scalars = self.predict(batch, targets)
        return {"loss": masked_patch_loss(pred, raster.of(self.target(batch.images)), raster.mask), **scalars}

    def images_of(self, pred_BLP: Tensor, images_B3HW: Tensor) -> Tensor:
        """Predictions of all patches as float32 images [B, 3, H, W] in 0..1 (values outside are cut).

        With norm_pix_loss a patch is predicted only up to its mean and contrast: these are taken from the image that is
        regressed, so colour and brightness of a patch are not the model's achievement.
        """
        known = self.target_images(images_B3HW)
        return unnormalised(
            images_of_pixels(pred_BLP, known, self.student.config.patch, normalised=self.config.norm_pix_loss)
        )

    @torch.no_grad()
    def view(self, batch: Batch, targets: Mapping[str, Targets]) -> View:
        """The images, the mask, every patch as predicted (see `images_of`), and the attention that chose the mask."""
        pred, raster, _ = self.predict(base.without_drop_path(batch), targets)
        reconstruction = self.images_of(raster.spread(pred, self.student.patches), batch.images)
        return self.seen(batch, targets, raster, reconstruction)
