"""Regression targets and losses: pixels of patches, of the image or its low frequencies; features of a teacher."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mimscale.models.patches import flatten_patches, patches_at, patchify, unflatten_patches, unpatchify
from mimscale.types import imagenet_statistics

FeatureNorm = Literal["whiten", "none", "l2"]
FeatureLoss = Literal["smoothl1", "l2", "l1", "cosine"]
PIXEL_EPS = 1e-6
WHITEN_EPS = 1e-5


def pixel_statistics(pixels_BLP: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, L, 1] over the values of each patch; unbiased variance, plus 1e-6."""
    variance, mean = torch.var_mean(pixels_BLP, dim=-1, keepdim=True)
    return mean, (variance + PIXEL_EPS).sqrt()


def normalised_pixels(pixels_BLP: Tensor) -> Tensor:
    """(pixels - mean) / deviation of `pixel_statistics` in one kernel, LayerNorm's; equal up to rounding.

    LayerNorm divides by the biased deviation: of n values, sqrt((n - 1) / n) of the unbiased one.
    """
    count = pixels_BLP.shape[-1]
    share = (count - 1) / count
    return F.layer_norm(pixels_BLP, (count,), pixels_BLP.new_full((count,), math.sqrt(share)), eps=PIXEL_EPS * share)


def pixel_target(images_B3HW: Tensor, patch: int, normalise: bool, ids_BK: Tensor | None = None) -> Tensor:
    """Pixels of every patch in raster order, float32 [B, L, p*p*3] (MAE, sec. 3); with `ids`, int64 [B, K], of these
    patches only, in one pass: [B, K, p*p*3].

    normalise: subtract the mean of the patch and divide by its standard deviation (MAE's norm_pix_loss).
    """
    if ids_BK is not None:
        pixels = flatten_patches(patches_at(images_B3HW.float(), patch, ids_BK))
        return normalised_pixels(pixels) if normalise else pixels
    pixels = flatten_patches(patchify(images_B3HW.float(), patch))
    if not normalise:
        return pixels
    mean, deviation = pixel_statistics(pixels)
    return (pixels - mean) / deviation


def images_from_pixels(pred_BLP: Tensor, images_B3HW: Tensor, patch: int, normalised: bool) -> Tensor:
    """The inverse of `pixel_target`: float32 [B, 3, H, W].

    If the target was normalised, the prediction holds no mean and contrast of a patch; these are taken from `images`.
    """
    pixels = pred_BLP.float()
    if normalised:
        mean, deviation = pixel_statistics(flatten_patches(patchify(images_B3HW.float(), patch)))
        pixels = pixels * deviation + mean
    height, width = images_B3HW.shape[-2:]
    return unpatchify(unflatten_patches(pixels, patch), (height // patch, width // patch))


def low_pass_disc(size: tuple[int, int], radius: float, device: torch.device | None = None) -> Tensor:
    """Which coefficients of torch.fft.fft2 the filter of `low_pass` keeps: bool [H, W].

    A hard disc around the centre of the shifted spectrum's array. For an even side the centre is half a bin away from
    the zero frequency, as in the release; so the disc is not symmetric and the filtered image is slightly complex.
    """

    def distance(side: int) -> Tensor:
        frequency = (torch.arange(side, device=device) + side // 2) % side - side // 2
        return frequency + (0.0 if side % 2 else 0.5)

    rows, columns = distance(size[0]), distance(size[1])
    return rows[:, None].square() + columns.square() <= radius**2


@torch.no_grad()
def low_pass(images_B3HW: Tensor, radius: float) -> Tensor:
    """ImageNet-normalised images without their high frequencies, normalised again: float32 [B, 3, H, W] (PixMIM).

    radius: in bins of the discrete spectrum, which are cycles per image side. As released, the result is the modulus of
    the filtered 0..1 image: values below zero (ringing at sharp edges) become positive.
    """
    mean, std = imagenet_statistics(images_B3HW.device)
    spectrum = torch.fft.fft2(images_B3HW.float() * std + mean)
    disc = low_pass_disc((images_B3HW.shape[-2], images_B3HW.shape[-1]), radius, images_B3HW.device)
    return (torch.fft.ifft2(spectrum * disc).abs() - mean) / std


def normalise_features(features_BTC: Tensor, norm: FeatureNorm) -> Tensor:
    """Teacher features of any type -> float32, per token: LayerNorm without affine (whiten), unit length (l2) or
    unchanged.

    whiten as released by MaskAlign, eps 1e-5.
    """
    features = features_BTC.float()
    if norm == "whiten":
        return F.layer_norm(features, features.shape[-1:], eps=WHITEN_EPS)
    return F.normalize(features, dim=-1) if norm == "l2" else features


def feature_loss(pred_BTC: Tensor, target_BTC: Tensor, kind: FeatureLoss) -> Tensor:
    """Mean over batch, tokens and channels, fp32 scalar. target: float32.

    smoothl1: twice PyTorch's with beta = 1, as released by MaskAlign: the squared error where it is quadratic. cosine:
    1 - cosine similarity, mean over batch and tokens.
    """
    pred = pred_BTC.float()
    if kind == "smoothl1":
        return 2 * F.smooth_l1_loss(pred, target_BTC)
    if kind == "cosine":
        return 1 - F.cosine_similarity(pred, target_BTC, dim=-1).mean()
    return F.mse_loss(pred, target_BTC) if kind == "l2" else F.l1_loss(pred, target_BTC)
