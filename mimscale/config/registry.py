"""Sections of a recipe that name a file: `<package>/<name>.py` defines one class, whose Config validates the section.

So adding a method or a masking policy edits nothing here. What pydantic says of a mistake becomes one line.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from mimscale.config.base import Strict
from mimscale.errors import nearest


class MethodConfig(Strict):
    """Base of every method's own section. name: file of the method in mimscale/methods."""

    name: str


def names_in(package: str) -> list[str]:
    """Files of a package that define a class each: all but base.py and those that start with an underscore.

    Folders that were added to the package's `__path__` count, so files may lie outside of the installed package.
    """
    modules = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return sorted(m.name for m in modules if not m.ispkg and not m.name.startswith("_") and m.name != "base")


def class_in(package: str, name: str, key: str) -> Any:
    """The class with a Config that <package>/<name>.py defines. key: where the name stood. Raises ValueError."""
    if name not in names_in(package):
        raise ValueError(f"{key} = '{name}' is unknown{nearest(name, names_in(package))}")
    module = importlib.import_module(f"{package}.{name}")
    local = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    found = [c for c in local if issubclass(getattr(c, "Config", type(None)), BaseModel)]
    if len(found) != 1:
        raise TypeError(f"{package}.{name} must define exactly one class with a Config, found {len(found)}")
    return found[0]


def section_by_name(
    package: str, section: Mapping[str, Any], key: str, defaults: Mapping[str, Any] | None = None
) -> Any:
    """Validate a section by the Config of the class that it names. Raises ValueError with one line.

    key: of the name, with its place in the recipe (`method.name`). defaults: values for what the section leaves out and
    that Config has no default for.
    """
    *place, field = key.split(".")
    defaults = defaults or {}
    section = {**{k: v for k, v in defaults.items() if k == field}, **section}
    if field not in section:
        raise ValueError(f"{key} is missing; choose one of {', '.join(names_in(package))}")
    config: type[BaseModel] = class_in(package, str(section[field]), key).Config
    wanted = {name for name, info in config.model_fields.items() if info.is_required()}
    try:
        return config.model_validate({**{k: v for k, v in defaults.items() if k in wanted}, **section})
    except ValidationError as error:
        raise ValueError(first_line(error, config, tuple(place))) from None


def first_line(error: ValidationError, model: type[BaseModel], prefix: tuple[str, ...]) -> str:
    """pydantic's report of the first mistake, in one line with its place and the nearest known key."""
    first = error.errors()[0]
    # pydantic also names the member of a union or the validator that failed: tuple[...], function-before[...]
    place = [
        *prefix,
        *(str(part) for part in first["loc"] if not re.search(r"[\[(]|^constrained-|^(str|int|dict)$", str(part))),
    ]
    name = ".".join(place)
    if first["type"] == "extra_forbidden":
        known = _known_keys(model, tuple(str(part) for part in first["loc"])[:-1])
        return f"unknown key {name}{nearest(place[-1], known)}"
    if first["type"] == "missing":
        return f"{name} is missing"
    message = shortened(first["msg"].removeprefix("Value error, "), 600)
    if first["type"] == "value_error":
        return f"{name}: {message}" if name and name not in message else message
    return f"{name} = {shortened(repr(first['input']), 200)}: {message[0].lower()}{message[1:]}"


def shortened(text: str, most: int) -> str:
    """The text, or its beginning and its end."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def _known_keys(model: type[BaseModel], place: Sequence[str]) -> list[str]:
    for part in place:
        field = model.model_fields.get(part)
        annotation = field.annotation if field else None
        sections = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type(BaseModel))]
        if sections:  # else `part` is a name of the user's own, such as a teacher's
            model = sections[0]
    return sorted(model.model_fields)
