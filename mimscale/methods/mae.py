"""MAE: masked autoencoders (He et al., CVPR 2022, arXiv 2111.06377)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mimscale.config import Fraction, MethodConfig, RunConfig
from mimscale.contracts import Batch, Needs, Noise, Targets, TeacherInfo, View
from mimscale.errors import UserError
from mimscale.methods import base
from mimscale.models.decoder import MAEDecoder
from mimscale.models.masking import kept_patches, mask_of, random_order, restore_order
from mimscale.models.patches import assemble, cut, from_pixels_last, pixels_last, unnormalised
from mimscale.models.vit import ViT

PIXEL_EPS = 1e-6


class MAEConfig(MethodConfig):
    """norm_pix_loss: normalise the pixels of each target patch (the published ImageNet recipes do)."""

    mask_ratio: Fraction = 0.75
    norm_pix_loss: bool = True
    decoder_width: int = Field(512, ge=4)
    decoder_depth: int = Field(8, ge=1)
    decoder_heads: int = Field(16, ge=1)

    @model_validator(mode="after")
    def _divisible(self) -> MAEConfig:
        if self.decoder_width % self.decoder_heads or self.decoder_width % 4:
            rule = f"must be divisible by decoder_heads = {self.decoder_heads} and by 4"
            raise ValueError(f"decoder_width = {self.decoder_width} {rule}")
        return self


class Prediction(NamedTuple):
    """pred: [B, L, p*p*3] in raster order, in the parameters' type. mask: float32 [B, L], 1 = masked."""

    pred: Tensor
    mask: Tensor


def pixel_statistics(pixels_BLP: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation [B, L, 1] of each patch over all its values; the variance is the unbiased one, plus 1e-6."""
    variance, mean = torch.var_mean(pixels_BLP, dim=-1, keepdim=True)
    return mean, (variance + PIXEL_EPS).sqrt()


def masked_patch_loss(pred_BLP: Tensor, target_BLP: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean squared error per patch, averaged over the masked patches of the batch (sec. 3). fp32 scalar."""
    per_patch = (pred_BLP.float() - target_BLP).square().mean(dim=-1)
    return (per_patch * mask_BL).sum() / mask_BL.sum()


class MAE(base.Method):
    """`student` sees the visible patches; `decoder` predicts the pixels of all; the loss reads the masked ones."""

    Config = MAEConfig

    @classmethod
    def check(cls, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        config = cast(MAEConfig, run.method)
        patches = run.grid[0] * run.grid[1]
        keep = kept_patches(patches, config.mask_ratio)
        if not 0 < keep < patches:
            raise UserError(
                f"method.mask_ratio = {config.mask_ratio} keeps {keep} of {patches} patches; choose a ratio that keeps "
                "at least one and masks at least one"
            )
        if teachers:
            raise UserError(f"teachers.{next(iter(teachers))}: mae reads no teacher; remove the section teachers")

    def __init__(self, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        super().__init__(run, teachers)
        self.config = config = cast(MAEConfig, run.method)
        every = run.engine.activation_checkpointing
        self.student: ViT = ViT(run.student, run.data.image_size, checkpoint_every=every)
        self.decoder = MAEDecoder(
            in_width=run.student.width,
            width=config.decoder_width,
            depth=config.decoder_depth,
            heads=config.decoder_heads,
            patch=run.student.patch,
            grid=run.grid,
            checkpoint_every=every,
        )
        self.keep = kept_patches(self.student.patches, config.mask_ratio)
        noise = {"mask": Noise("uniform", (self.student.patches,))}
        if run.student.drop_path:
            noise["drop_path"] = Noise("uniform", (run.student.depth, 2))
        self.needs = Needs(noise=noise)

    def target(self, images_B3HW: Tensor) -> Tensor:
        """Pixels of every patch, float32 [B, L, p*p*3], normalised per patch if the config says so."""
        pixels = pixels_last(cut(images_B3HW.float(), self.student.config.patch))
        if not self.config.norm_pix_loss:
            return pixels
        mean, deviation = pixel_statistics(pixels)
        return (pixels - mean) / deviation

    def predict(self, batch: Batch) -> Prediction:
        """Encode the visible patches and predict the pixels of all."""
        order = random_order(batch.noise["mask"])
        ids_keep = order[:, : self.keep]
        latent = self.student(batch.images, ids_keep, batch.noise.get("drop_path")).tokens
        return Prediction(self.decoder(latent, restore_order(order)), mask_of(ids_keep, self.student.patches))

    def forward(self, batch: Batch, targets: Mapping[str, Targets]) -> dict[str, Tensor]:
        pred, mask = self.predict(batch)
        return {"loss": masked_patch_loss(pred, self.target(batch.images), mask)}

    def images_of(self, pred_BLP: Tensor, images_B3HW: Tensor) -> Tensor:
        """Predictions of all patches as float32 images [B, 3, H, W] in 0..1 (values outside are cut).

        With norm_pix_loss a patch is predicted only up to its mean and contrast: these are taken from the true image,
        so colour and brightness of a patch are not the model's achievement.
        """
        pixels = pred_BLP.float()
        if self.config.norm_pix_loss:
            mean, deviation = pixel_statistics(pixels_last(cut(images_B3HW.float(), self.student.config.patch)))
            pixels = pixels * deviation + mean
        return unnormalised(assemble(from_pixels_last(pixels, self.student.config.patch), self.student.grid))

    @torch.no_grad()
    def view(self, batch: Batch, targets: Mapping[str, Targets]) -> View:
        """The images, the mask, and every patch as predicted (see `images_of`)."""
        pred, mask = self.predict(replace(batch, noise={"mask": batch.noise["mask"]}))
        return View(unnormalised(batch.images), mask=mask, reconstruction=self.images_of(pred, batch.images))
