"""Tokens gathered, put back and in raster order."""

from __future__ import annotations

import torch

from mimscale.models.token_selection import gather_tokens, mask_of, raster_order, scatter_tokens
from mimscale.types import Masks


def order(count: int = 10) -> torch.Tensor:
    return torch.rand(3, count, generator=torch.Generator().manual_seed(0)).argsort(dim=1)


def test_mask_marks_what_is_not_seen() -> None:
    mask = mask_of(order()[:, :4], 10)
    assert mask.sum(1).tolist() == [6, 6, 6] and not mask.gather(1, order()[:, :4]).any()


def test_raster_order_without_dropped_patches() -> None:
    raster = raster_order(Masks(order()[:, :4], order()[:, 4:]))
    assert torch.equal(raster.ids, torch.arange(10).expand(3, -1))
    assert torch.equal(torch.gather(order(), 1, raster.ids_restore), raster.ids)
    assert torch.equal(raster.mask, mask_of(order()[:, :4], 10)) and raster.dropped(10) is None
    tokens = torch.randn(3, 10, 2)
    assert raster.gather(tokens) is tokens and raster.scatter(tokens, 10) is tokens


def test_raster_order_leaves_out_dropped_patches() -> None:
    masks = Masks(torch.tensor([[5, 1]]), torch.tensor([[4, 0]]))  # of six; 2 and 3 are dropped
    raster = raster_order(masks)
    assert raster.ids.tolist() == [[0, 1, 4, 5]] and raster.mask.tolist() == [[1, 0, 1, 0]]
    assert raster.ids_restore.tolist() == [[3, 1, 2, 0]]
    assert mask_of(raster.ids, 6).tolist() == [[0, 0, 1, 1, 0, 0]]
    tokens = torch.arange(1.0, 7)[None, :, None]
    assert raster.gather(tokens).flatten().tolist() == [1, 2, 5, 6]
    assert raster.scatter(raster.gather(tokens), 6).flatten().tolist() == [1, 2, 0, 0, 5, 6]


def test_scatter_is_the_inverse_of_gather() -> None:
    ids, tokens = order(6)[:, :3], torch.randn(3, 6, 2, 3)
    spread = scatter_tokens(gather_tokens(tokens, ids), ids, 6)
    assert torch.equal(spread, tokens * (1 - mask_of(ids, 6))[:, :, None, None])
