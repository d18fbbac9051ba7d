"""What stands in each line of metrics.jsonl and evals.jsonl beside its figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STAMPS = ("time", "uptime_s")
"""Seconds since 1970, by a clock that may be set; and since the launch began, by one that nobody sets, and that stands
still while the machine sleeps (CLOCK_MONOTONIC)."""
NO_FIGURES = ("event", "step", "at", "seconds", *STAMPS)


def figures(line: Mapping[str, Any]) -> dict[str, Any]:
    """name -> value, as it is."""
    return {name: value for name, value in line.items() if name not in NO_FIGURES}
