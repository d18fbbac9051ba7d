"""Masks against the official programs' and against torch.multinomial."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mimscale.models.masking import (
    attentive_keep,
    gather_tokens,
    kept_patches,
    mask_of,
    masked_units,
    random_keep,
    random_order,
    restore_order,
    restore_visible,
    scatter_tokens,
    unit_mask,
    visible_ids,
)
from tests import golden


def test_golden() -> None:
    g = golden.load("attentive_masking_dev")
    for case in g.config["cases"]:
        part = g.part(f"L{case['L']}_r{round(100 * case['mask_ratio'])}")
        keep = kept_patches(case["L"], case["mask_ratio"])
        importance = part["cls_attention_per_head"][:, :, 1:].mean(1)
        torch.testing.assert_close(importance, part["importance"], rtol=1e-6, atol=0)
        ids = attentive_keep(part["importance"], part["exponential_noise"], keep)
        assert torch.equal(ids, part["attn_ids_keep"])
        everything = attentive_keep(part["importance"], part["exponential_noise"], case["L"])
        assert torch.equal(everything, part["attn_ids_shuffle"])
        assert torch.equal(gather_tokens(part["tokens"], ids), part["attn_tokens_kept"])
        uniform = random_keep(part["uniform_noise"], keep)
        assert torch.equal(uniform, part["random_ids_keep"])
        assert torch.equal(gather_tokens(part["tokens"], uniform), part["random_tokens_kept"])


@pytest.mark.parametrize(
    ("patches", "ratio", "keep"), [(196, 0.7, 58), (196, 0.75, 49), (256, 0.75, 64), (256, 0.7, 76), (16, 0.9, 1)]
)
def test_kept_patches(patches: int, ratio: float, keep: int) -> None:
    assert kept_patches(patches, ratio) == keep


@pytest.mark.parametrize("seed", range(5))
def test_attentive_draw_is_multinomial(seed: int) -> None:
    importance = torch.rand(7, 50, generator=torch.Generator().manual_seed(seed)).pow(3)
    theirs = torch.multinomial(importance, 20, generator=torch.Generator().manual_seed(seed + 100))
    noise = torch.empty(7, 50).exponential_(1, generator=torch.Generator().manual_seed(seed + 100))
    assert torch.equal(attentive_keep(importance, noise, 20), theirs)


def test_patches_without_importance_come_last() -> None:
    importance = torch.tensor([[0.0, 0.5, 0.0, 1e-20, 0.3]])
    noise = torch.tensor([[2.0, 1.0, 1.0, 3.0, 1.0]])
    assert attentive_keep(importance, noise, 5).tolist() == [[1, 4, 3, 2, 0]]
    assert attentive_keep(torch.zeros(1, 5, dtype=torch.float16), noise, 2).shape == (1, 2)


def test_restore_undoes_the_shuffle_and_mask_marks_the_rest() -> None:
    order = random_order(torch.rand(3, 10, generator=torch.Generator().manual_seed(0)))
    restored = torch.gather(order, 1, restore_order(order))
    assert torch.equal(restored, torch.arange(10).expand(3, -1))
    mask = mask_of(order[:, :4], 10)
    assert mask.sum(1).tolist() == [6, 6, 6] and not mask.gather(1, order[:, :4]).any()


def test_restoring_the_visible_serves_a_decoder_as_the_whole_order_does() -> None:
    order = random_order(torch.rand(3, 10, generator=torch.Generator().manual_seed(0)))
    tokens = torch.cat([torch.randn(3, 4, 2), torch.full((3, 6, 2), 7.0)], dim=1)  # four visible, then mask tokens
    whole, visible = restore_order(order), restore_visible(order[:, :4], 10)
    assert torch.equal(gather_tokens(tokens, visible), gather_tokens(tokens, whole))


def test_scatter_is_the_inverse_of_gather() -> None:
    ids = random_keep(torch.rand(2, 6, generator=torch.Generator().manual_seed(0)), 3)
    tokens = torch.randn(2, 6, 2, 3)
    spread = scatter_tokens(gather_tokens(tokens, ids), ids, 6)
    assert torch.equal(spread, tokens * (1 - mask_of(ids, 6))[:, :, None, None])


def test_policies() -> None:
    importance = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    noise = torch.tensor([[0.1, 4.0, 0.5, 1.0]])
    assert visible_ids("random", 2, noise, None).tolist() == [[0, 2]]
    assert visible_ids("topk", 2, None, importance).tolist() == [[1, 3]]
    assert visible_ids("attention", 2, noise, importance).tolist() == [[0, 2]]
    assert visible_ids("attention", 4, noise, importance).tolist() == [[0, 2, 3, 1]]


@pytest.mark.parametrize("case", range(4))
def test_golden_units(case: int) -> None:
    """With numpy's permutation as the order, SimMIM's masks come out."""
    g = golden.load("simmim_maskgen")
    size, unit, patch, ratio, seed, masked = g[f"cfg/{case}"].tolist()
    side = int(size // unit)
    assert masked_units(side**2, ratio) == masked
    stored, draw = g[f"mask/{case}"], np.random.RandomState(int(seed))
    order = torch.from_numpy(np.stack([draw.permutation(side**2) for _ in stored]))
    ours = unit_mask(order, int(masked), (side, side), int(unit // patch))
    assert torch.equal(ours, stored.flatten(1).float())


def test_units_of_a_grid_that_is_not_square() -> None:
    mask = unit_mask(torch.tensor([[5, 0, 1, 2, 3, 4]]), 2, (2, 3), 2).view(4, 6)
    assert mask.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 4], [2, 5], [3, 4], [3, 5]]
