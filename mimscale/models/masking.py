"""Which patches are seen. Pure functions of noise from outside: the same noise gives the same mask on every device."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mimscale.contracts import Noise

Masking = Literal["random", "attention", "topk"]
"""Visible patches: uniform (MAE), drawn in proportion to a teacher's CLS attention (MaskAlign), or its largest."""

SMALLEST_IMPORTANCE = 1e-30  # in float32: a patch without attention is drawn last, and still in the order of the noise


def kept_patches(patches: int, mask_ratio: float) -> int:
    """How many of `patches` stay visible: truncated in Python floats, as the official codes do (196 at 0.7: 58)."""
    return int(patches * (1 - mask_ratio))


def random_order(noise_BL: Tensor) -> Tensor:
    """Uniform noise [B, L] -> int64 permutation [B, L]; the first K are the visible patches (MAE, sec. 3)."""
    return torch.argsort(noise_BL, dim=1, stable=True)


def random_keep(noise_BL: Tensor, keep: int) -> Tensor:
    """Uniform noise [B, L] -> int64 ids [B, keep] of the visible patches, in drawn (not raster) order."""
    return random_order(noise_BL)[:, :keep]


def attentive_keep(importance_BL: Tensor, exponential_noise_BL: Tensor, keep: int) -> Tensor:
    """ids [B, keep] drawn without replacement with probability proportional to importance (MaskAlign).

    The largest importance / noise for unit-rate exponential noise: the draw that torch.multinomial makes of that noise.
    """
    scores = importance_BL.float().clamp_min(SMALLEST_IMPORTANCE) / exponential_noise_BL.float()
    return torch.topk(scores, keep, dim=1).indices


def mask_noise(masking: Masking, patches: int) -> dict[str, Noise]:
    """What `visible_ids` wants of a batch, by purpose."""
    kinds: dict[str, Literal["uniform", "exponential"]] = {"random": "uniform", "attention": "exponential"}
    return {"mask": Noise(kinds[masking], (patches,))} if masking in kinds else {}


def visible_ids(masking: Masking, keep: int, noise_BL: Tensor | None, attention_BL: Tensor | None) -> Tensor:
    """ids [B, keep] of the visible patches, in the order to be seen.

    noise: as `mask_noise` says, None for topk. attention: a teacher's CLS attention; random does not read it.
    """
    if masking == "random":
        assert noise_BL is not None
        return random_keep(noise_BL, keep)
    assert attention_BL is not None
    if masking == "topk":
        return torch.topk(attention_BL.float(), keep, dim=1).indices
    assert noise_BL is not None
    return attentive_keep(attention_BL, noise_BL, keep)


def restore_order(ids_shuffle_BL: Tensor) -> Tensor:
    """The inverse of a permutation [B, L]: where each patch, in raster order, stands in the shuffled sequence."""
    return torch.argsort(ids_shuffle_BL, dim=1)


def restore_visible(ids_keep_BK: Tensor, patches: int) -> Tensor:
    """int64 [B, L]: where each patch, in raster order, stands among the K visible; K, the first of the mask tokens, for
    every masked one. Serves a decoder as `restore_order` does, because all mask tokens are alike.
    """
    batch, keep = ids_keep_BK.shape
    places = torch.arange(keep, device=ids_keep_BK.device).expand(batch, keep)
    return torch.full((batch, patches), keep, device=ids_keep_BK.device).scatter(1, ids_keep_BK, places)


def mask_of(ids_keep_BK: Tensor, patches: int) -> Tensor:
    """float32 [B, L] in raster order: 1 = masked, 0 = visible."""
    mask = torch.ones(ids_keep_BK.shape[0], patches, device=ids_keep_BK.device)
    return mask.scatter_(1, ids_keep_BK, 0.0)


def masked_units(units: int, mask_ratio: float) -> int:
    """How many of `units` are masked, rounded up as in SimMIM's mask generator (49 at 0.6: 30)."""
    return math.ceil(units * mask_ratio)


def unit_mask(order_BU: Tensor, masked: int, unit_grid: tuple[int, int], factor: int) -> Tensor:
    """The first `masked` units of an order int64 [B, U], as a mask of patches: float32 [B, L], 1 = masked.

    unit_grid: rows and columns of units, U in all; each covers factor x factor patches (SimMIM).
    """
    units = mask_of(order_BU[:, masked:], order_BU.shape[1]).unflatten(1, unit_grid)
    return units.repeat_interleave(factor, 1).repeat_interleave(factor, 2).flatten(1)


def gather_tokens(tokens_BLX: Tensor, ids_BK: Tensor) -> Tensor:
    """tokens [B, L, ...] at ids [B, K] -> [B, K, ...]."""
    return torch.gather(tokens_BLX, 1, _index(ids_BK, tokens_BLX))


def scatter_tokens(tokens_BKX: Tensor, ids_BK: Tensor, patches: int) -> Tensor:
    """tokens [B, K, ...] put at ids [B, K] among zeros -> [B, L, ...]."""
    zeros = tokens_BKX.new_zeros(len(tokens_BKX), patches, *tokens_BKX.shape[2:])
    return zeros.scatter(1, _index(ids_BK, tokens_BKX), tokens_BKX)


def _index(ids_BK: Tensor, like_BLX: Tensor) -> Tensor:
    return ids_BK.reshape(*ids_BK.shape, *(1,) * (like_BLX.dim() - 2)).expand(-1, -1, *like_BLX.shape[2:])
