"""AMT's importance of patches (Gui et al. 2023, sec. 3): from attention, as bytes, and cropped like the image.

Importance is one number per patch of an image, computed from the attention of the student's last block. The released
code calls these numbers weights. Pure functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


def crop_importance(importance_BL: Tensor, grid: tuple[int, int], boxes_B4: Tensor, flips_B: Tensor) -> Tensor:
    """Importance of the uncropped image's patches -> of the crop's patches, float32 [B, L].

    Bilinear interpolation at the centres of the crop's patches; beyond the outermost centres the edge value is
    repeated. grid: rows and columns of both. boxes: crop (top, left, height, width) as fractions of the image; flips:
    bool [B], mirrored left-right after the crop.
    """
    top, left, height, width = boxes_B4.float()[:, :, None].unbind(1)
    rows, columns = ((torch.arange(n, device=boxes_B4.device) + 0.5) / n for n in grid)
    across = torch.where(flips_B[:, None], 1 - columns, columns)
    y_BR, x_BC = 2 * (top + height * rows) - 1, 2 * (left + width * across) - 1  # grid_sample counts from -1 to 1
    batch = len(boxes_B4)
    centres = torch.stack([x_BC[:, None].expand(batch, *grid), y_BR[:, :, None].expand(batch, *grid)], dim=3)
    maps = importance_BL.float().unflatten(1, grid)[:, None]
    return F.grid_sample(maps, centres, mode="bilinear", padding_mode="border", align_corners=False).flatten(1)
