"""MAE: masked autoencoders (He et al., CVPR 2022, arXiv 2111.06377).

Differences to the release: none in masks, network, target, loss, weight decay and learning rates. Drop path in the
encoder and a low-pass target are options that it lacks.
"""

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
from mimscale.models.patches import unnormalised
from mimscale.models.targets import images_of_pixels, low_pass, low_pass_disc, pixel_target
from mimscale.models.vit import ViT

TOKENS = {"student.cls_token", "decoder.mask_token"}  # decayed by MAE itself, exempt in OpenMMLab's methods


class MAEConfig(MethodConfig):
    """norm_pix_loss: normalise the pixels of each target patch (the published ImageNet recipes do).

    low_pass_radius: regress the image's low frequencies, up to so many cycles per side (PixMIM); null: the image as is.
    """

    mask_ratio: Fraction = 0.75
    norm_pix_loss: bool = True
    low_pass_radius: float | None = Field(None, gt=0)
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
    """pred: [B, L, p*p*3] in raster order, in the parameters' type. mask: float32 [B, L], 1 = masked.

    scalars: for the log.
    """

    pred: Tensor
    mask: Tensor
    scalars: dict[str, Tensor]


def masked_patch_loss(pred_BLP: Tensor, target_BLP: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean squared error per patch, averaged over the masked patches of the batch (sec. 3). fp32 scalar."""
    per_patch = (pred_BLP.float() - target_BLP).square().mean(dim=-1)
    return (per_patch * mask_BL).sum() / mask_BL.sum()


class MAE(base.Method):
    """`student` sees the visible patches; `decoder` predicts the pixels of all; the loss reads the masked ones."""

    Config = MAEConfig
    student: ViT

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
        if config.low_pass_radius is not None:
            side = run.data.image_size
            disc = low_pass_disc((side, side), config.low_pass_radius, torch.device("cpu"))
            passed = int(disc.sum())
            if not 0 < passed < disc.numel():
                raise UserError(
                    f"method.low_pass_radius = {config.low_pass_radius} passes {passed} of {disc.numel()} frequencies "
                    f"at {side} px; choose one between 1 and {side // 2}"
                )
        if teachers:
            raise UserError(
                f"teachers.{next(iter(teachers))}: {config.name} reads no teacher; remove the section teachers"
            )

    def __init__(self, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        super().__init__(run, teachers)
        self.config = config = cast(MAEConfig, run.method)
        every = run.engine.activation_checkpointing
        self.student = self.make_student(run)
        self.decoder = MAEDecoder(
            in_width=run.student.width,
            width=config.decoder_width,
            depth=config.decoder_depth,
            heads=config.decoder_heads,
            patch=run.student.patch,
            grid=run.grid,
            prefix=self.student.prefix,
            checkpoint_every=every,
        )
        self.keep = kept_patches(self.student.patches, config.mask_ratio)
        noise = {"mask": Noise("uniform", (self.student.patches,))}
        if run.student.drop_path:
            noise["drop_path"] = Noise("uniform", (self.student.depth, 2))
        self.needs = Needs(noise=noise)

    def make_student(self, run: RunConfig) -> ViT:
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

    def encode(self, batch: Batch, ids_keep_BK: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What the decoder gets of the visible patches, [B, prefix + K, D], and scalars for the log."""
        return self.student(batch.images, ids_keep_BK, batch.noise.get("drop_path")).tokens, {}

    def predict(self, batch: Batch) -> Prediction:
        """Encode the visible patches and predict the pixels of all."""
        order = random_order(batch.noise["mask"])
        ids_keep = order[:, : self.keep]
        latent, scalars = self.encode(batch, ids_keep)
        pred = self.decoder(latent, restore_order(order))
        return Prediction(pred, mask_of(ids_keep, self.student.patches), scalars)

    def forward(self, batch: Batch, targets: Mapping[str, Targets]) -> dict[str, Tensor]:
        pred, mask, scalars = self.predict(batch)
        return {"loss": masked_patch_loss(pred, self.target(batch.images), mask), **scalars}

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
        """The images, the mask, and every patch as predicted (see `images_of`)."""
        pred, mask, _ = self.predict(replace(batch, noise={"mask": batch.noise["mask"]}))
        return View(unnormalised(batch.images), mask=mask, reconstruction=self.images_of(pred, batch.images))
