"""Images to patches and back; pixels to vectors and back."""

from __future__ import annotations

import torch
from torch import Tensor

from mimscale.types import imagenet_statistics


def patchify(images_BCHW: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> patches [B, L, C, p, p] in raster order (row by row). H and W are multiples of `patch`.

    MAE's function of this name also flattens each patch: that is `flatten_patches`.
    """
    batch, channels, height, width = images_BCHW.shape
    grid = images_BCHW.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def patches_at(images_BCHW: Tensor, patch: int, ids_BK: Tensor) -> Tensor:
    """The patches at ids int64 [B, K] only: [B, K, C, p, p]. The other pixels are not copied."""
    grid = images_BCHW.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 1, 3, 5)
    columns = grid.shape[2]
    image = torch.arange(len(ids_BK), device=ids_BK.device)[:, None]
    return grid[image, ids_BK // columns, ids_BK % columns]


def unpatchify(patches_BLCpp: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: [B, L, C, p, p] -> [B, C, H, W] for a grid of (rows, columns)."""
    batch, _, channels, patch, _ = patches_BLCpp.shape
    maps = patches_BLCpp.reshape(batch, *grid, channels, patch, patch)
    return maps.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, grid[0] * patch, grid[1] * patch)


def flatten_patches(patches_BLCpp: Tensor) -> Tensor:
    """[B, L, C, p, p] -> [B, L, p*p*C]; order inside a vector as in MAE: row, column, channel."""
    return patches_BLCpp.permute(0, 1, 3, 4, 2).flatten(2)


def unflatten_patches(vectors_BLP: Tensor, patch: int) -> Tensor:
    """The inverse of `flatten_patches` for three channels: [B, L, p*p*3] -> [B, L, 3, p, p]."""
    return vectors_BLP.unflatten(2, (patch, patch, 3)).permute(0, 1, 4, 2, 3)


def unnormalised(images_B3HW: Tensor) -> Tensor:
    """ImageNet-normalised images of any float type -> float32, clamped to 0..1."""
    mean, std = imagenet_statistics(images_B3HW.device)
    return (images_B3HW.float() * std + mean).clamp(0, 1)
