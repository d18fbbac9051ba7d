"""Times in words."""

from __future__ import annotations

import pytest

from mimscale.files.durations import duration


@pytest.mark.parametrize(
    "seconds, words",
    [
        (-1.0, "0 s"),
        (0.3, "0.3 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (119.0, "119 s"),
        (120.0, "2 min"),
        (7_199.0, "120 min"),
        (12_600.0, "3.5 h"),
        (172_800.0, "2 d"),
        (86_400.0 * 1234, "1,234 d"),
    ],
)
def test_one_unit(seconds: float, words: str) -> None:
    assert duration(seconds) == words
