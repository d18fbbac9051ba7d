"""The most attention_targets patches."""

from __future__ import annotations

import torch

from tests.masking.policies import attention_targets, batch, policy, teacher


def test_the_largest_are_seen_and_equal_ones_in_raster_order() -> None:
    masking = policy(32, 16, teacher(2), policy="topk", ratio=0.5)
    assert not masking.needs.noise and masking.needs.teachers["t"].cls_attention
    masks = masking.choose(batch(), attention_targets(torch.tensor([[0.1, 0.4, 0.2, 0.3]])))
    assert masks.visible.tolist() == [[1, 3]] and masks.masked.tolist() == [[2, 0]]
    assert masking.choose(batch(), attention_targets(torch.full((1, 4), 0.25))).visible.tolist() == [[0, 1]]


def test_units() -> None:
    masking = policy(64, 16, teacher(), policy="topk", ratio=0.7, unit=32)
    attention = torch.zeros(1, 16)
    attention[0, 13] = 1.0
    assert masking.choose(batch(), attention_targets(attention)).visible.tolist() == [[8, 9, 12, 13]]
