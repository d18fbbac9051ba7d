"""Which patches are seen. Pure functions of noise from outside: the same noise gives the same mask on every device."""

from __future__ import annotations

import torch
from torch import Tensor

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


def restore_order(ids_shuffle_BL: Tensor) -> Tensor:
    """The inverse of a permutation [B, L]: where each patch, in raster order, stands in the shuffled sequence."""
    return torch.argsort(ids_shuffle_BL, dim=1)


def mask_of(ids_keep_BK: Tensor, patches: int) -> Tensor:
    """float32 [B, L] in raster order: 1 = masked, 0 = visible."""
    mask = torch.ones(ids_keep_BK.shape[0], patches, device=ids_keep_BK.device)
    return mask.scatter_(1, ids_keep_BK, 0.0)


def gather_tokens(tokens_BLX: Tensor, ids_BK: Tensor) -> Tensor:
    """tokens [B, L, ...] at ids [B, K] -> [B, K, ...]."""
    index = ids_BK.reshape(*ids_BK.shape, *(1,) * (tokens_BLX.dim() - 2)).expand(-1, -1, *tokens_BLX.shape[2:])
    return torch.gather(tokens_BLX, 1, index)
