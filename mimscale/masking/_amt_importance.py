"""How much a network attends to each patch of an image, as one number per patch that outlives the step (AMT, sec. 3).

Pure functions: attention -> importance, its storage in bytes, and its way through the crop that an image took.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mimscale.models.patches import cut


def importance_of(attention_BHL: Tensor) -> Tensor:
    """Attention of the whole image's patches -> float32 [B, L] in 0..1: min-max of each head, then mean over heads.

    A head that attends to all patches alike says nothing and counts as 0; what is not a number stays that.
    """
    low, high = attention_BHL.float().aminmax(dim=2, keepdim=True)
    share = (attention_BHL.float() - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    return share.mean(dim=1)


def as_bytes(importance_BL: Tensor) -> Tensor:
    """0..1 -> uint8, rounded to the nearest 1 / 255."""
    return (importance_BL * 255).round().to(torch.uint8)


def from_bytes(bytes_BL: Tensor) -> Tensor:
    """uint8 -> float32 in 0..1."""
    return bytes_BL.float() / 255


def through_crop(importance_BL: Tensor, grid: tuple[int, int], boxes_B4: Tensor, flips_B: Tensor) -> Tensor:
    """Importance of the whole image's patches -> of the crop's, float32 [B, L]: bilinear at the crop's patch centres.

    grid: rows and columns of both. boxes: crop (top, left, height, width) in parts of the image; flips: bool [B],
    mirrored left-right after the crop. Beyond the outermost patch centres the map goes on as it is at its edge.
    """
    top, left, height, width = boxes_B4.float()[:, :, None].unbind(1)
    rows, columns = ((torch.arange(n, device=boxes_B4.device) + 0.5) / n for n in grid)
    across = torch.where(flips_B[:, None], 1 - columns, columns)
    y_BR, x_BC = 2 * (top + height * rows) - 1, 2 * (left + width * across) - 1  # grid_sample counts from -1 to 1
    batch = len(boxes_B4)
    places = torch.stack([x_BC[:, None].expand(batch, *grid), y_BR[:, :, None].expand(batch, *grid)], dim=3)
    maps = importance_BL.float().unflatten(1, grid)[:, None]
    return F.grid_sample(maps, places, mode="bilinear", padding_mode="border", align_corners=False).flatten(1)


def through_released_crop(
    importance_BL: Tensor, grid: tuple[int, int], boxes_B4: Tensor, flips_B: Tensor, image_size: int
) -> Tensor:
    """What the release does instead: float32 [B, L], sums over the pixels of each patch.

    It divides the box by the image's size in whole numbers, which leaves 0, or 1 where the crop touches the far edge.
    So it always enlarges the map's first 2 (or 3) rows and columns, whatever the crop. Loops over the batch: it exists
    to compare with published numbers.
    """
    patch = image_size // grid[0]
    maps = importance_BL.float().unflatten(1, grid)
    sums = []
    for one, box, flip in zip(maps, boxes_B4.tolist(), flips_B.tolist(), strict=True):
        bottom, right = (2 + int(start + length + 1e-6) for start, length in zip(box[:2], box[2:], strict=True))
        pixels = F.interpolate(one[None, None, :bottom, :right], (image_size, image_size), mode="bilinear").clamp(0, 1)
        pixels = pixels.flip(3) if flip else pixels
        sums.append(cut(pixels, patch).sum(dim=(2, 3, 4))[0])
    return torch.stack(sums)
