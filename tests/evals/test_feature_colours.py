from __future__ import annotations

import torch

from mimscale.evals.feature_colours import RANGE, colours, principal_scores


def blobs(seed: int, width: int = 24, side: int = 6) -> torch.Tensor:
    """[3, side * side, width]: three directions of falling variance, skewed, and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, side * side, 3, generator=generator).exp() * torch.tensor([4.0, 2.0, 1.0])
    directions = torch.linalg.qr(torch.randn(width, 3, generator=generator))[0]
    return hidden @ directions.T + 0.01 * torch.randn(3, side * side, width, generator=generator)


def rotation(width: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(9)))[0]


def test_scores_are_those_of_a_singular_value_decomposition() -> None:
    x = blobs(0)
    flat = x.reshape(-1, x.shape[-1])
    u, _, _ = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    expected = u[:, :3] / u[:, :3].std(0, correction=0)
    found = principal_scores(x).reshape(-1, 3)
    torch.testing.assert_close(found.abs(), expected.abs(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.std(0, correction=0), torch.ones(3))


def test_the_same_features_in_another_basis_have_the_same_colours() -> None:
    """Signs, order and rotation of a network's channels mean nothing."""
    x = blobs(1)
    first, turned, mirrored = colours([x, x @ rotation(24) * 5 + 3, -x])
    assert first.shape == (3, 6, 6, 3) and first.min() >= 0 and first.max() <= 1
    torch.testing.assert_close(turned, first, atol=2e-3, rtol=0)
    torch.testing.assert_close(mirrored, first, atol=2e-3, rtol=0)


def test_colours_do_not_depend_on_the_sign_of_an_eigenvector() -> None:
    """The first network's signs come from the third moment: these features are skewed to the right."""
    x = blobs(2)
    torch.testing.assert_close(colours([x])[0], colours([-x])[0])
    middle = colours([x])[0].reshape(-1, 3).median(dim=0).values
    assert (middle < 0.5).all()  # more than half of the patches lie left of the mean


def test_another_network_stays_another(width: int = 24) -> None:
    """Aligning turns, and does not copy: unrelated features keep unrelated colours."""
    a, b = colours([blobs(3), blobs(4)])
    flat = [2 * RANGE * (one.reshape(-1, 3) - 0.5) for one in (a, b)]
    assert torch.corrcoef(torch.stack([flat[0][:, 0], flat[1][:, 0]]))[0, 1].abs() < 0.6


def test_grids_of_other_sizes_and_features_without_variance() -> None:
    fine, coarse = colours([blobs(5, side=6), blobs(5, side=3)])
    assert fine.shape == (3, 6, 6, 3) and coarse.shape == (3, 3, 3, 3)
    flat, narrow = colours([torch.ones(2, 4, 8), torch.rand(2, 4, 2, generator=torch.Generator().manual_seed(0))])
    assert (flat == 0.5).all() and narrow.isfinite().all()
