"""Tokens of some patches: gathered, put back, marked, and in raster order again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mimscale.types import Masks


def gather_tokens(tokens_BLX: Tensor, ids_BK: Tensor) -> Tensor:
    """tokens [B, L, ...] at ids [B, K] -> [B, K, ...]."""
    return torch.gather(tokens_BLX, 1, _index(ids_BK, tokens_BLX))


def scatter_tokens(tokens_BKX: Tensor, ids_BK: Tensor, patches: int) -> Tensor:
    """tokens [B, K, ...] put at ids [B, K] among zeros -> [B, L, ...]."""
    zeros = tokens_BKX.new_zeros(len(tokens_BKX), patches, *tokens_BKX.shape[2:])
    return zeros.scatter(1, _index(ids_BK, tokens_BKX), tokens_BKX)


def mask_of(ids_keep_BK: Tensor, patches: int) -> Tensor:
    """float32 [B, L] in raster order: 1 = not seen, 0 = visible."""
    mask = torch.ones(ids_keep_BK.shape[0], patches, device=ids_keep_BK.device)
    return mask.scatter_(1, ids_keep_BK, 0.0)


class Raster(NamedTuple):
    """The visible and the masked patches of a `Masks` in raster order, S = K + M in all; none that was thrown.

    ids: int64 [B, S], place in the grid. places: int64 [B, S], place in the sequence that has the K visible first and
    then the M masked. mask: float32 [B, S], 1 = masked.
    """

    ids: Tensor
    places: Tensor
    mask: Tensor

    def of(self, all_BLX: Tensor) -> Tensor:
        """What belongs to these patches, [B, S, ...], of what is there for all, [B, L, ...]."""
        return all_BLX if self.ids.shape[1] == all_BLX.shape[1] else gather_tokens(all_BLX, self.ids)

    def spread(self, some_BSX: Tensor, patches: int) -> Tensor:
        """The inverse of `of`: [B, L, ...] with zeros where a patch was thrown."""
        return some_BSX if self.ids.shape[1] == patches else scatter_tokens(some_BSX, self.ids, patches)

    def thrown(self, patches: int) -> Tensor | None:
        """float32 [B, L], 1 = thrown; None where none is."""
        return None if self.ids.shape[1] == patches else mask_of(self.ids, patches)


def in_raster_order(masks: Masks) -> Raster:
    """The order of what a decoder reads, or of what the loss of a whole grid reads."""
    ids, places = torch.cat([masks.visible, masks.masked], dim=1).sort(dim=1)
    return Raster(ids, places, (places >= masks.visible.shape[1]).float())


def _index(ids_BK: Tensor, like_BLX: Tensor) -> Tensor:
    return ids_BK.reshape(*ids_BK.shape, *(1,) * (like_BLX.dim() - 2)).expand(-1, -1, *like_BLX.shape[2:])
