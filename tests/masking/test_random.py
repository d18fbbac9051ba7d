"""Uniform masks against the official programs'."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mimscale.masking.random import random_order
from mimscale.models.token_selection import gather_tokens, raster_order
from tests import golden
from tests.masking.policies import batch, policy


def test_golden() -> None:
    g = golden.load("attentive_masking_dev")
    for case in g.config["cases"]:
        part = g.part(f"L{case['L']}_r{round(100 * case['mask_ratio'])}")
        masking = policy(16 * round(case["L"] ** 0.5), ratio=case["mask_ratio"])
        visible = masking.choose(batch(part["uniform_noise"]), {}).visible
        golden.equal(visible, part["random_ids_keep"])
        assert torch.equal(gather_tokens(part["tokens"], visible), part["random_tokens_kept"])


def test_by_patches_the_first_of_the_order_are_visible() -> None:
    masking = policy(32, policy="random", ratio=0.5)
    assert masking.needs.noise["mask"].kind == "uniform" and masking.needs.noise["mask"].shape == (4,)
    masks = masking.choose(batch(torch.tensor([[0.1, 0.9, 0.2, 0.5]])), {})
    assert masks.visible.tolist() == [[0, 2]] and masks.masked.tolist() == [[3, 1]]
    assert masking.importance(batch(), {}) is None


def test_by_units_the_first_of_the_order_are_masked() -> None:
    masking = policy(32, policy="random", ratio=0.5, unit=16)
    masks = masking.choose(batch(torch.tensor([[0.1, 0.9, 0.2, 0.5]])), {})
    assert masks.masked.tolist() == [[0, 2]] and masks.visible.tolist() == [[3, 1]]


@pytest.mark.parametrize("case", range(4))
def test_golden_units(case: int) -> None:
    """With numpy's permutation as the order, SimMIM's masks come out."""
    g = golden.load("simmim_maskgen")
    size, unit, patch, ratio, seed, masked = g[f"cfg/{case}"].tolist()
    masking = policy(int(size), int(patch), ratio=ratio, unit=int(unit))
    assert masking.count.masked == masked
    stored, draw = g[f"mask/{case}"], np.random.RandomState(int(seed))
    order = torch.from_numpy(np.stack([draw.permutation(masking.count.units) for _ in stored]))
    noise = order.argsort(dim=1) / masking.count.units
    assert torch.equal(random_order(noise), order)
    raster = raster_order(masking.choose(batch(noise), {}))
    golden.equal(raster.mask, stored.flatten(1).float())
