"""What differs between recipes, key by key. Plain values in and out, so it also serves the recipe of a run of another
release, which this one may no longer accept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

ABSENT = "absent"
"""Stands for a key that a recipe does not have."""


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested sections as `section.key` -> value; an empty section is a value."""
    return dict(_flatten(values))


def differences(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """`section.key` -> its value in each recipe, ABSENT where it has none, for the keys whose values are not all equal.

    recipes: nested sections, or flat already. A section or value that is left out, null or empty is the same. Keys are
    in the order of the recipes, a section's together.
    """
    tables = [flat(recipe) for recipe in recipes]
    keys = list(dict.fromkeys(key for table in tables for key in table))
    sections = list(dict.fromkeys(_section(key) for key in keys))
    keys.sort(key=lambda key: sections.index(_section(key)))
    found = {key: [table.get(key, ABSENT) for table in tables] for key in keys}
    return {key: row for key, row in found.items() if any(_meaning(value) != _meaning(row[0]) for value in row)}


def _meaning(value: Any) -> Any:
    return None if value in (ABSENT, {}) else value


def _section(key: str) -> str:
    return key.partition(".")[0]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
