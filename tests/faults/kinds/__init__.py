"""All kinds of faults, by name. A new one is a function in one of these files."""

from __future__ import annotations

from tests.faults.kinds import damaged, disks, killed, numbers, signals  # noqa: F401  (they register theirs)
from tests.faults.kinds._kind import KINDS, Kind

__all__ = ["KINDS", "Kind"]
