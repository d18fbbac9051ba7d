"""AMT's importance of patches (Liu et al. 2023, sec. 3): from attention, as bytes, and cropped like the image.

Importance is one number per patch of an image, computed from the attention of the student's last block. The released
code calls these numbers weights. Pure functions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def importance_from_attention(attention_BHL: Tensor) -> Tensor:
    """Attention to the patches of the uncropped images -> float32 [B, L] in 0..1: min-max per head, then mean over
    heads.

    A head with equal attention to all patches counts as 0. NaN stays NaN.
    """
    low, high = attention_BHL.float().aminmax(dim=2, keepdim=True)
    share = (attention_BHL.float() - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    return share.mean(dim=1)


def to_bytes(importance_BL: Tensor) -> Tensor:
    """0..1 -> uint8, rounded to the nearest 1 / 255."""
    return (importance_BL * 255).round().to(torch.uint8)


def from_bytes(bytes_BL: Tensor) -> Tensor:
    """uint8 -> float32 in 0..1."""
    return bytes_BL.float() / 255


def crop_importance(
    importance_BL: Tensor, grid: tuple[int, int], patch: int, boxes_B4: Tensor, flips_B: Tensor
) -> Tensor:
    """Importance of the uncropped image's patches -> of the crop's patches, float32 [B, L].

    The map is interpolated bilinearly at each pixel of the crop, and a patch gets the mean over its pixels (released:
    the sum). Beyond the outermost centres of the map the edge value is repeated. So the crop of a whole image blurs the
    map slightly, as released. grid: rows and columns of both. patch: side of a patch in pixels. boxes: crop (top, left,
    height, width) as fractions of the image; flips: bool [B], mirrored left-right after the crop.
    """
    top, left, height, width = boxes_B4.float().unbind(1)
    left, width = left + torch.where(flips_B, width, 0), torch.where(flips_B, -width, width)  # from right to left
    rows_BRr = _patch_weights(top, height, grid[0], patch)
    columns_BCc = _patch_weights(left, width, grid[1], patch)
    maps_Brc = importance_BL.float().unflatten(1, grid)
    # Products and sums in place of matmul, which TF32 would round.
    maps_BRc = (rows_BRr[..., None] * maps_Brc[:, None]).sum(2)
    return (maps_BRc[:, :, None] * columns_BCc[:, None]).sum(3).flatten(1)


def _patch_weights(start_B: Tensor, length_B: Tensor, count: int, patch: int) -> Tensor:
    """Weights of the map's `count` cells in each of a crop's `count` patches along one axis, float32 [B, count, count].

    Mean over the pixels of a patch of the two weights of linear interpolation. Bilinear interpolation on a rectangle of
    pixels is separable, so the map takes these weights along rows and along columns.
    """
    pixels = (torch.arange(count * patch, device=start_B.device) + 0.5) / (count * patch)
    cells_BP = ((start_B[:, None] + length_B[:, None] * pixels) * count - 0.5).clamp(0, count - 1)
    weights_BPc = (1 - (cells_BP[:, :, None] - torch.arange(count, device=start_B.device)).abs()).clamp_min(0)
    return weights_BPc.unflatten(1, (count, patch)).mean(2)
