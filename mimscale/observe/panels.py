"""Pictures of what a method sees and does, out of a `View`, without a plotting library."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mimscale.contracts import View

GREY = 0.5  # where a patch is masked
BLACK = 0.0  # where it was thrown away
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # dark to bright, equally spaced
GAP, SMALLEST = 2, 64  # pixels between tiles; smaller tiles are enlarged


def tiles(view: View, samples: int = 8) -> dict[str, Tensor]:
    """What the view holds, as uint8 pictures [samples, 3, H, W] in host memory.

    input, then where there are any: masked; reconstruction (predicted where masked, true elsewhere); attention
    (share of the strongest patch, dark to bright, over the darkened picture). Patches lie on a square grid; thrown ones
    are black.
    """
    images = view.images[:samples].float()
    rows = {"input": images}
    kept = 1.0 if view.thrown is None else 1 - _to_pixels(view.thrown[:samples], images.shape[-1])
    if view.mask is not None:
        hidden = _to_pixels(view.mask[:samples], images.shape[-1])
        rows["masked"] = (images * (1 - hidden) + GREY * hidden) * kept + BLACK * (1 - kept)
        if view.reconstruction is not None:
            predicted = images * (1 - hidden) + view.reconstruction[:samples].float() * hidden
            rows["reconstruction"] = predicted * kept + BLACK * (1 - kept)
    if view.attention is not None:
        attention = view.attention[:samples].float()
        share = _to_pixels(attention / attention.amax(dim=1, keepdim=True).clamp_min(1e-12), images.shape[-1])
        rows["attention"] = 0.35 * images + 0.65 * heat(share)
    return {name: (row.clamp(0, 1) * 255).round().to(torch.uint8).cpu() for name, row in rows.items()}


def panel(view: View, samples: int = 8) -> Tensor:
    """uint8 [3, H, W]: one column per sample, the rows of `tiles` below each other."""
    rows = torch.stack(list(tiles(view, samples).values()))
    side = rows.shape[-1]
    scale = max(1, math.ceil(SMALLEST / side))
    rows = rows.repeat_interleave(scale, dim=3).repeat_interleave(scale, dim=4)
    rows = F.pad(rows, (0, GAP, 0, GAP), value=255)
    picture = rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return picture[:, :-GAP, :-GAP].contiguous()


def heat(share_B1HW: Tensor) -> Tensor:
    """Values in 0..1 [B, 1, H, W] -> colours in 0..1 [B, 3, H, W], linear between the colours of HEAT."""
    colours = torch.tensor(HEAT, device=share_B1HW.device) / 255
    place = share_B1HW.clamp(0, 1) * (len(HEAT) - 1)
    below = place.floor().long().clamp_max(len(HEAT) - 2)
    part = place - below
    mixed = colours[below] * (1 - part[..., None]) + colours[below + 1] * part[..., None]
    return mixed.squeeze(1).permute(0, 3, 1, 2)


def _to_pixels(values_BL: Tensor, side: int) -> Tensor:
    """One value per patch [B, L] -> one per pixel, float32 [B, 1, side, side]."""
    grid = math.isqrt(values_BL.shape[1])
    patch = side // grid
    maps = values_BL.float().view(-1, 1, grid, grid)
    return maps.repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)
