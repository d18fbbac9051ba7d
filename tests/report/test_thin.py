"""A thinned curve has every spike of the whole one."""

from __future__ import annotations

import numpy as np
import pytest

from mimscale.report.thin import COLUMNS, MEANS, kept, means


def test_a_short_curve_is_kept_whole() -> None:
    x = np.arange(2.0 * COLUMNS)
    assert kept(x, x).tolist() == list(range(2 * COLUMNS))
    assert len(means(x, x)[0]) == MEANS and not len(means(x[: 2 * MEANS], x[: 2 * MEANS])[0])


@pytest.mark.parametrize("spike", [1e6, -1e6, np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 1, 54_321, 99_999])
def test_a_single_odd_value_among_many_is_kept(spike: float, at: int) -> None:
    x, y = np.arange(100_000.0) * 20, np.random.default_rng(0).random(100_000)
    y[at] = spike
    chosen = kept(x, y)
    assert at in chosen and len(chosen) <= 2 * COLUMNS + 3
    assert chosen[0] == 0 and chosen[-1] == 99_999 and (np.diff(chosen) > 0).all()


def test_every_column_keeps_its_lowest_and_highest() -> None:
    x, y = np.arange(5_000.0), np.random.default_rng(1).random(5_000)
    chosen = y[kept(x, y, columns=5)]
    for part in np.split(y, 5):
        assert part.min() in chosen and part.max() in chosen


def test_uneven_steps_and_one_place() -> None:
    x = np.concatenate([np.arange(3_000.0), [1e9]])
    assert {0, 3_000} <= set(kept(x, x).tolist())
    assert len(kept(np.zeros(3_000), np.arange(3_000.0))) == 2


def test_means_are_those_of_the_finite_values() -> None:
    x, y = np.arange(4_000.0), np.tile([1.0, 3.0], 2_000)
    y[::100] = np.nan
    places, values = means(x, y, columns=10)
    assert (
        len(places) == 10
        and values == pytest.approx([198 * 1 + 200 * 3] * 10, rel=1)
        and (np.abs(values - 2) < 0.02).all()
    )
    assert not len(means(x, np.full(4_000, np.nan))[0])
