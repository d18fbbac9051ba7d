from __future__ import annotations

import math

import pytest
import torch

from mimscale.evals.spectrum import EPSILON, rankme, spread


def by_definition(features: torch.Tensor) -> float:
    singular = torch.linalg.svdvals(features.double())
    shares = singular / singular.sum() + EPSILON
    return float(torch.exp(-(shares * shares.log()).sum()))


@pytest.mark.parametrize("shape", [(300, 40), (40, 300), (50, 50)])
def test_rankme_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -4, shape[1])
    assert rankme(features) == pytest.approx(by_definition(features), rel=1e-5)


def test_rankme_counts_directions() -> None:
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1))).Q
    for rank in (1, 5, 64):
        features = torch.eye(64)[:rank].repeat(10, 1) @ basis  # `rank` equal singular values
        assert rankme(features) == pytest.approx(rank, rel=2e-4)
    assert 1 <= rankme(torch.zeros(8, 4)) <= 1.001


def test_rankme_and_spread_take_pieces_and_half_precision() -> None:
    features = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(2))
    assert rankme(features) == pytest.approx(by_definition(features), rel=1e-6)
    assert rankme(features.bfloat16()) == pytest.approx(by_definition(features.bfloat16()), rel=1e-6)
    assert spread(features.half()) == pytest.approx(spread(features), rel=1e-3)


def test_spread_is_one_for_a_gaussian_and_zero_for_a_point() -> None:
    random = torch.Generator().manual_seed(3)
    gaussian = torch.randn(4000, 128, generator=random)
    assert spread(gaussian) == pytest.approx(1, abs=0.02)
    assert spread(torch.ones(10, 16) * torch.arange(1, 11)[:, None]) == pytest.approx(0, abs=1e-7)
    line = torch.randn(4000, 1, generator=random).sign() * torch.eye(16)[0]  # two opposite points
    assert spread(line) == pytest.approx(math.sqrt(16) / 16, rel=1e-2)
