"""How long something takes, in words."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """In one unit, rounded: 0.3 s, 42 s, 2.5 min, 12 min, 3.5 h, 46 h, 2.1 d."""
    value, unit = max(0.0, seconds), "s"
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            value, unit = seconds / size, name
            break
    return f"{value:,.0f} {unit}" if value >= 9.95 else f"{value:.1f}".removesuffix(".0") + f" {unit}"
