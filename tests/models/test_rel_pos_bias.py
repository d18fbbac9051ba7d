"""Relative position biases of another grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline

from mimscale.models.rel_pos_bias import CLS_ROWS, _geometric_offsets, resize, table_rows


@pytest.mark.parametrize(("old", "new"), [(4, 6), (14, 24), (7, 5)])
def test_a_table_follows_splines_through_its_offsets(old: int, new: int) -> None:
    """Of a table that is a product of a column and a row, the result is the product of two splines."""
    random = np.random.default_rng(0)
    column, row = random.standard_normal((2, 2 * old - 1))
    head = torch.from_numpy(np.outer(column, row).reshape(-1, 1)).float()
    cls = torch.tensor([[3.0], [4.0], [5.0]])
    table = torch.cat([torch.cat([head, cls]), 2 * torch.cat([head, cls])], dim=1)
    known = _geometric_offsets(old, new)
    at = np.clip(np.arange(-new + 1, new), known[0], known[-1])
    expected = np.outer(CubicSpline(known, column)(at), CubicSpline(known, row)(at))
    resized = resize(table, (new, new))
    assert resized.shape == (table_rows((new, new)), 2) and torch.equal(resized[-CLS_ROWS:], table[-CLS_ROWS:])
    torch.testing.assert_close(
        resized[:-CLS_ROWS, 0], torch.from_numpy(expected.reshape(-1)).float(), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(resized[:, 1], 2 * resized[:, 0])


def test_near_offsets_stay_and_the_scale_reaches_the_edge() -> None:
    offsets = _geometric_offsets(14, 24)
    assert offsets[12:15].tolist() == [-1, 0, 1] and offsets[-1] == pytest.approx(23, abs=1e-3)
    table = torch.randn(table_rows((4, 4)), 3, generator=torch.Generator().manual_seed(0))
    assert resize(table, (4, 4)) is table
    small, large = table[:-3].view(7, 7, 3), resize(table, (6, 6))[:-3].view(11, 11, 3)
    torch.testing.assert_close(large[4:7, 4:7], small[2:5, 2:5])
