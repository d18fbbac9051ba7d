"""Changes to a recipe from Python, as the words of the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimscale.errors import UserError


def as_words(overrides: Mapping[str, Any]) -> list[str]:
    """{"section.key": value} -> ["section.key=VALUE"], VALUE as YAML's flow style, which JSON is. Raises UserError."""
    if not isinstance(overrides, Mapping):
        raise UserError(f"overrides is a {type(overrides).__name__}; give a mapping, such as {{'schedule.steps': 100}}")
    return [f"{key}={_flow(key, value)}" for key, value in overrides.items()]


def _flow(key: str, value: Any) -> str:
    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        raise UserError(f"override {key}: a {type(value).__name__} has no place in a recipe; give plain values")

    try:
        return json.dumps(value, default=plain, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError) as error:  # a mapping with itself or with odd keys in it
        if isinstance(error, UserError):
            raise
        raise UserError(f"override {key}: {error}; give plain values") from None
