"""Reading recipes: a name or a YAML file, what it extends, and `section.key=value` overrides."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mimscale.config.extends import merged
from mimscale.config.registry import first_line
from mimscale.config.run import RunConfig
from mimscale.errors import UserError
from mimscale.files.regular import read_regular


class UniqueKeys(yaml.SafeLoader):
    """YAML's rule that a mapping has each key once, which PyYAML does not keep: there the last one wins.

    Nor are numbers read as YAML 1.1 has them: 010 as 8, and 1:30 as 90.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is given twice; remove one", node.value[index][0].start_mark
                )
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> Any:
        self._refuse_old_numbers(node)
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> Any:
        self._refuse_old_numbers(node)
        return super().construct_yaml_float(node)

    def _refuse_old_numbers(self, node: yaml.ScalarNode) -> None:
        if ":" in node.value or re.match(r"[-+]?0[0-9_]+$", node.value):
            problem = f"'{node.value}' is read in several ways; write the number in plain digits, or a text in quotes"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


UniqueKeys.add_constructor("tag:yaml.org,2002:int", UniqueKeys.construct_yaml_int)
UniqueKeys.add_constructor("tag:yaml.org,2002:float", UniqueKeys.construct_yaml_float)


def recipe_names() -> list[str]:
    files = (entry.name for entry in resources.files("mimscale.recipes").iterdir())
    return sorted(f[:-5] for f in files if f.endswith(".yaml"))


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe (a name in mimscale/recipes or a path to YAML) and apply `section.key=value` overrides.

    Raises UserError with one line that names the value, the rule and the fix.
    """
    values, base = read_recipe(recipe)
    _override(values, overrides)
    return validate(values, source=recipe if base is None else f"{recipe} (extends {base})")


def with_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """A configuration with `section.key=value` overrides. Raises UserError."""
    values = config.dump()
    _override(values, overrides)
    return validate(values, source="the recipe")


def _override(values: dict[str, Any], overrides: Sequence[str]) -> None:
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"override '{override}' is not of the form section.key=value")
        _assign(values, key.split("."), _parse_value(key, text))


def read_recipe(recipe: str) -> tuple[dict[str, Any], str | None]:
    """A recipe's values with those of its base merged in, before overrides and defaults, and what it extends.

    A file may extend any recipe of this package by its name, or a whole file; a recipe of this package extends a whole
    one of its kind. Raises UserError where that does not hold, and for what cannot be read.
    """
    own = _read_yaml(recipe)
    if "extends" not in own:
        unknown = [str(key) for key in own if key not in RunConfig.model_fields]
        for key in difflib.get_close_matches("extends", unknown, n=1):
            raise UserError(f"{recipe}: unknown key {key}; did you mean 'extends'?")
        return own, None
    base = own.pop("extends")
    if not isinstance(base, str):
        raise UserError(f"{recipe}: extends = {base!r}: must be the name of a recipe or a path that ends in .yaml")
    try:
        return merged(_base_values(recipe, base), own), base
    except UserError as error:
        raise UserError(f"{recipe}: extends = {base}: {error}") from None


def _base_values(recipe: str, base: str) -> dict[str, Any]:
    if _is_file(recipe) and not _is_file(base):
        return read_recipe(base)[0]
    path = str(Path(recipe).parent / base) if _is_file(base) else base
    values = _read_yaml(path)
    if "extends" in values:
        raise UserError(
            f"it extends {values['extends']} itself; a base is the name of a recipe of this package or a whole file, "
            f"such as `mimscale train {path} --show` prints"
        )
    return values


def validate(values: Mapping[str, Any], source: str) -> RunConfig:
    """Plain values -> RunConfig; one line of UserError for the first thing that is wrong."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {first_line(error, RunConfig, ())}") from None


def _is_file(recipe: str) -> bool:
    return recipe.endswith((".yaml", ".yml"))


def _read_yaml(recipe: str) -> dict[str, Any]:
    if _is_file(recipe):
        try:
            text = read_regular(Path(recipe)).decode("utf-8")
        except OSError as error:
            raise UserError(f"recipe '{recipe}' cannot be read: {error.strerror}") from None
        except ValueError:  # not UTF-8, or a path with a null byte
            raise UserError(f"recipe '{recipe}' is not a text file in UTF-8; save it in UTF-8") from None
    elif recipe in recipe_names():
        text = resources.files("mimscale.recipes").joinpath(f"{recipe}.yaml").read_text()
    else:
        close = difflib.get_close_matches(recipe, recipe_names(), n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise UserError(f"recipe '{recipe}' is unknown; {hint}`mimscale recipes` lists them, a path ends in .yaml")
    try:
        values = yaml.load(text, UniqueKeys)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that no calendar has is a ValueError
        raise UserError(f"recipe '{recipe}' is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"recipe '{recipe}' must be a mapping of sections, found {type(values).__name__}")
    return values


def _parse_value(key: str, text: str) -> Any:
    try:
        value = yaml.load(text, UniqueKeys)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None)
        raise UserError(f"override {key}={text}: the value is not YAML{f': {problem}' if problem else ''}") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _assign(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1]):
        inner = values.get(key)
        if inner is None:  # absent, or null: a section that is left out
            inner = values[key] = {}
        if not isinstance(inner, dict):
            raise UserError(f"override {'.'.join(keys)}: {'.'.join(keys[: depth + 1])} is a value, not a section")
        values = inner
    values[keys[-1]] = value


def fingerprint(values: Mapping[str, Any]) -> str:
    """sha256 of plain values, independent of the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
