"""Numbers out of files that are not trusted: JSON knows integers of any length, NaN, and truth values beside them."""

from __future__ import annotations

from typing import Any

LARGEST, LARGEST_WHOLE = 1e300, 2**53


def number(value: Any) -> float | int | None:
    """A finite number that arithmetic can work with, as it is; None for everything else."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
    return value if good else None


def whole(value: Any) -> int | None:
    """An integer from 0 on that a float holds exactly; None for everything else."""
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST_WHOLE
    return value if good else None
