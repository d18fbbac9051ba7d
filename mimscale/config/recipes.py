"""Reading recipes: a name or a YAML file, and `section.key=value` overrides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mimscale.config.registry import first_line
from mimscale.config.run import RunConfig
from mimscale.errors import UserError, nearest


def recipe_names() -> list[str]:
    files = (entry.name for entry in resources.files("mimscale.recipes").iterdir())
    return sorted(f[:-5] for f in files if f.endswith(".yaml"))


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe (a name in mimscale/recipes or a path to YAML) and apply `section.key=value` overrides.

    Raises UserError with one line that names the value, the rule and the fix.
    """
    values = _read_recipe(recipe)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"override '{override}' is not of the form section.key=value")
        _assign(values, key.split("."), _parse_value(key, text))
    return validate(values, source=recipe)


def validate(values: Mapping[str, Any], source: str) -> RunConfig:
    """Plain values -> RunConfig; one line of UserError for the first thing that is wrong."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {first_line(error, RunConfig, ())}") from None


def _read_recipe(recipe: str) -> dict[str, Any]:
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        if recipe not in recipe_names():
            raise UserError(
                f"recipe '{recipe}' is unknown{nearest(recipe, recipe_names())}; or give a path that ends in .yaml"
            )
        text = resources.files("mimscale.recipes").joinpath(f"{recipe}.yaml").read_text()
    else:
        try:
            text = path.read_text()
        except OSError as error:
            raise UserError(f"recipe '{recipe}' cannot be read: {error.strerror}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"recipe '{recipe}' is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"recipe '{recipe}' must be a mapping of sections, found {type(values).__name__}")
    return values


def _parse_value(key: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override {key}={text}: the value is not YAML") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _assign(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1]):
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise UserError(f"override {'.'.join(keys)}: {'.'.join(keys[: depth + 1])} is a value, not a section")
        values = inner
    values[keys[-1]] = value


def fingerprint(values: Mapping[str, Any]) -> str:
    """sha256 of plain values, independent of the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
