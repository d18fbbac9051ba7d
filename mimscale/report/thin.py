"""Fewer points of a curve without losing a spike."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
COLUMNS = 500
"""Of pixels that a curve is drawn on; a wider chart shows no more."""
MEANS = 120
"""Parts of a long curve whose means are drawn over it."""


def kept(x: Floats, y: Floats, columns: int = COLUMNS) -> NDArray[np.int64]:
    """Indices, ascending, of what to draw of a curve [N] with ascending x: of each of `columns` equal parts of x the
    lowest and the highest y, and a number that is not finite; also the first and the last point.

    All of them where there are no more than 2 * columns.
    """
    if len(x) <= 2 * columns:
        return np.arange(len(x))
    width = (x[-1] - x[0]) / columns or 1.0
    part = np.minimum(((x - x[0]) / width).astype(np.int64), columns - 1)
    starts = np.flatnonzero(np.diff(part, prepend=-1))
    chosen = [np.array([0, len(x) - 1])]
    for replacement, better in ((np.inf, np.argmin), (-np.inf, np.argmax)):
        filled = np.where(np.isfinite(y), y, replacement)
        chosen.append(np.array([s + better(filled[s:e]) for s, e in zip(starts, [*starts[1:], len(x)], strict=True)]))
    holes = np.flatnonzero(~np.isfinite(y))
    chosen.append(holes[np.unique(part[holes], return_index=True)[1]] if len(holes) else holes)
    return np.unique(np.concatenate(chosen)).astype(np.int64)


def means(x: Floats, y: Floats, columns: int = MEANS) -> tuple[NDArray[np.int64], Floats]:
    """(index of the middle point, mean of y) of each of `columns` equal parts of x that holds a finite y.

    Nothing where there are no more than 2 * columns points: such a curve needs no mean.
    """
    finite = np.flatnonzero(np.isfinite(y))
    if len(x) <= 2 * columns or not len(finite):
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    width = (x[-1] - x[0]) / columns or 1.0
    part = np.minimum(((x[finite] - x[0]) / width).astype(np.int64), columns - 1)
    starts = np.flatnonzero(np.diff(part, prepend=-1))
    pieces = np.split(finite, starts[1:])
    return np.array([piece[len(piece) // 2] for piece in pieces]), np.array([y[piece].mean() for piece in pieces])
