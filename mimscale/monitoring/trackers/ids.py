"""The id under which a program knows a run, in a small JSON file of the run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mimscale.files.regular import read_regular


def stored_id(path: Path, place: Mapping[str, str | None]) -> str | None:
    """The id that an earlier launch left, None where there is none for this place (project, address) or none at all."""
    try:
        values = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or any(values.get(key) != value for key, value in place.items()):
        return None
    found = values.get("id")
    return found if isinstance(found, str) and found.isalnum() else None
