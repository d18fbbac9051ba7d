"""Images of what a method sees and predicts, made from a `View` without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mimscale.types import View

GREY, DARK = 0.5, 0.125  # where a patch is masked, where it is dropped
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # dark to bright, equally spaced
SAMPLES = 8  # columns of a panel
GAP, SMALLEST = 2, 64  # pixels between tiles; smaller tiles are enlarged


def tiles(view: View, samples: int = SAMPLES) -> dict[str, Tensor]:
    """What the view holds, as uint8 images [samples, 3, H, W] in host memory.

    input, then where there are any: masked (grey; dropped patches dark); reconstruction (predicted where masked, true
    elsewhere); attention, student attention (share of the strongest patch, dark to bright, over the darkened image);
    features (their three strongest components as red, green and blue). Patches lie on a square grid.
    """
    images = view.images[:samples].float()
    rows = {"input": images}
    if view.mask is not None:
        hidden = _to_pixels(view.mask[:samples], images.shape[-1])
        dark = (
            torch.zeros_like(hidden) if view.dropped is None else _to_pixels(view.dropped[:samples], images.shape[-1])
        )
        hidden = torch.maximum(hidden, dark)
        rows["masked"] = images * (1 - hidden) + GREY * hidden + (DARK - GREY) * dark
        if view.reconstruction is not None:
            predicted = view.reconstruction[:samples].float() * (hidden - dark)
            rows["reconstruction"] = images * (1 - hidden) + predicted + DARK * dark
    if view.attention is not None:
        rows["attention"] = 0.35 * images + 0.65 * heat(_share(view.attention[:samples], images))
    if view.student_attention is not None:
        rows["student attention"] = 0.35 * images + 0.65 * heat(_share(view.student_attention[:samples], images))
    if view.features is not None:
        rows["features"] = _to_pixels(components(view.features[:samples]), images.shape[-1])
    return {name: (row.clamp(0, 1) * 255).round().to(torch.uint8).cpu() for name, row in rows.items()}


def panel(tiles_B3HW: Mapping[str, Tensor]) -> Tensor:
    """`tiles` -> uint8 [3, H, W]: one column per sample, the rows below each other."""
    rows = torch.stack(list(tiles_B3HW.values()))
    side = rows.shape[-1]
    scale = max(1, math.ceil(SMALLEST / side))
    rows = rows.repeat_interleave(scale, dim=3).repeat_interleave(scale, dim=4)
    rows = F.pad(rows, (0, GAP, 0, GAP), value=255)
    whole = rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return whole[:, :-GAP, :-GAP].contiguous()


def heat(share_B1HW: Tensor) -> Tensor:
    """Values in 0..1 [B, 1, H, W] -> colours in 0..1 [B, 3, H, W], linear between the colours of HEAT."""
    colours = torch.tensor(HEAT, device=share_B1HW.device) / 255
    place = share_B1HW.clamp(0, 1) * (len(HEAT) - 1)
    below = place.floor().long().clamp_max(len(HEAT) - 2)
    part = place - below
    mixed = colours[below] * (1 - part[..., None]) + colours[below + 1] * part[..., None]
    return mixed.squeeze(1).permute(0, 3, 1, 2)


def components(features_BLD: Tensor) -> Tensor:
    """Features [B, L, D] -> colours in 0..1 [B, L, 3]: the first three principal components over all patches.

    Each runs from its 2nd to its 98th percentile. Its sign, which is arbitrary, makes the largest loading positive.
    """
    tokens_ND = features_BLD.flatten(0, 1).double().nan_to_num(posinf=0, neginf=0)
    tokens_ND = tokens_ND - tokens_ND.mean(dim=0)
    directions_D3 = torch.linalg.eigh(tokens_ND.T @ tokens_ND).eigenvectors[:, -3:].flip(1)
    largest = directions_D3.gather(0, directions_D3.abs().argmax(dim=0, keepdim=True))
    colours_N3 = tokens_ND @ (directions_D3 * largest.sign())
    low, high = colours_N3.quantile(torch.tensor([0.02, 0.98], dtype=torch.float64), dim=0)
    colours_N3 = ((colours_N3 - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return colours_N3.float().view(*features_BLD.shape[:2], 3)


def _share(attention_BL: Tensor, images_B3HW: Tensor) -> Tensor:
    """Attention at any scale -> share of the strongest patch, a map for the images, float32 [B, 1, H, W]."""
    attention = attention_BL.float().nan_to_num(posinf=0)  # a 16-bit teacher's row may overflow
    return _to_pixels(attention / attention.amax(dim=1, keepdim=True).clamp_min(1e-12), images_B3HW.shape[-1])


def _to_pixels(values: Tensor, side: int) -> Tensor:
    """One value per patch [B, L], or C of them [B, L, C] -> float32 [B, 1 or C, side, side]."""
    grid = math.isqrt(values.shape[1])
    patch = side // grid
    maps = values.float().view(len(values), grid, grid, -1).permute(0, 3, 1, 2)
    return maps.repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)
