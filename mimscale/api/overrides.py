"""Changes to a recipe from Python, as the words of the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimscale.errors import UserError


def as_words(overrides: Mapping[str, Any]) -> list[str]:
    """{"section.key": value} -> ["section.key=VALUE"], VALUE as YAML's flow style, which JSON is. Raises UserError."""
    return [f"{key}={_flow(key, value)}" for key, value in overrides.items()]


def _flow(key: str, value: Any) -> str:
    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        raise UserError(f"override {key}: a {type(value).__name__} has no place in a recipe; give plain values")

    return json.dumps(value, default=plain, ensure_ascii=False)
