"""Select the tokens of some patches, put them back, and bring visible and masked patches into raster order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mimscale.types import Masks


def gather_tokens(tokens_BLX: Tensor, ids_BK: Tensor) -> Tensor:
    """tokens [B, L, ...] at ids int64 [B, K] -> [B, K, ...]."""
    return torch.gather(tokens_BLX, 1, _index(ids_BK, tokens_BLX))


def scatter_tokens(tokens_BKX: Tensor, ids_BK: Tensor, patches: int) -> Tensor:
    """tokens [B, K, ...] written at ids int64 [B, K] into zeros -> [B, L, ...]."""
    zeros = tokens_BKX.new_zeros(len(tokens_BKX), patches, *tokens_BKX.shape[2:])
    return zeros.scatter(1, _index(ids_BK, tokens_BKX), tokens_BKX)


def mask_of(ids_keep_BK: Tensor, patches: int) -> Tensor:
    """MAE's mask, float32 [B, L] in raster order: 0 at `ids_keep`, 1 elsewhere."""
    mask = torch.ones(ids_keep_BK.shape[0], patches, device=ids_keep_BK.device)
    return mask.scatter_(1, ids_keep_BK, 0.0)


class RasterOrder(NamedTuple):
    """The visible and the masked patches of a `Masks`, S = K + M in all, in raster order: row by row, from the top
    left.

    Masks come in the order in which they were drawn. A decoder, and a loss over the grid, need raster order.

    ids: int64 [B, S], index of each patch in the grid, ascending; dropped patches are missing.
    ids_restore: int64 [B, S], index of each patch in the sequence of the K visible, then the M masked patches (MAE's
        word). Gathering that sequence at `ids_restore` brings it into raster order.
    mask: float32 [B, S], 1 = masked.
    """

    ids: Tensor
    ids_restore: Tensor
    mask: Tensor

    def gather(self, all_BLX: Tensor) -> Tensor:
        """Values of all patches [B, L, ...] -> of these patches [B, S, ...]."""
        return all_BLX if self.ids.shape[1] == all_BLX.shape[1] else gather_tokens(all_BLX, self.ids)

    def scatter(self, some_BSX: Tensor, patches: int) -> Tensor:
        """The inverse of `gather`: [B, S, ...] -> [B, L, ...], zero at dropped patches."""
        return some_BSX if self.ids.shape[1] == patches else scatter_tokens(some_BSX, self.ids, patches)

    def dropped(self, patches: int) -> Tensor | None:
        """float32 [B, L], 1 = dropped: neither visible nor masked; None where no patch is."""
        return None if self.ids.shape[1] == patches else mask_of(self.ids, patches)


def raster_order(masks: Masks) -> RasterOrder:
    """Sort the patches of `masks` by their place in the grid."""
    ids, ids_restore = torch.cat([masks.visible, masks.masked], dim=1).sort(dim=1)
    return RasterOrder(ids, ids_restore, (ids_restore >= masks.visible.shape[1]).float())


def _index(ids_BK: Tensor, like_BLX: Tensor) -> Tensor:
    return ids_BK.reshape(*ids_BK.shape, *(1,) * (like_BLX.dim() - 2)).expand(-1, -1, *like_BLX.shape[2:])
