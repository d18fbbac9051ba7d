"""A protocol's Config as options of the command line: the field `max_steps` becomes `--max-steps`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import PurePath
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError

from mimscale.config.base import Strict
from mimscale.errors import UserError

C = TypeVar("C", bound=Strict)
PREFIX = "config."  # of the destination, apart from those of the shared options
METAVARS = {int: "N", float: "X", str: "TEXT"}


def add_options(parser: argparse.ArgumentParser, config: type[Strict]) -> None:
    """One option per field: its description and default as help; values are checked by `config_of`."""
    if not config.model_fields:
        return
    group = parser.add_argument_group("options of this protocol")
    for name, field in config.model_fields.items():
        text = (field.description or "").replace("%", "%%")
        if not field.is_required() and field.default is not None:
            text += f" (default {field.default})"
        kind, several = _kind(field.annotation)
        options: dict[str, Any] = {"dest": PREFIX + name, "default": argparse.SUPPRESS, "help": text.strip()}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            options["choices"] = [str(choice) for choice in get_args(kind)]
        else:
            options["metavar"] = METAVARS.get(kind, "VALUE")
        if several:
            options["nargs"] = "+"
        group.add_argument(_flag(name), required=field.is_required(), **options)


def config_of(args: Mapping[str, Any], config: type[C]) -> C:
    """The Config of what was given. Raises UserError with the option, its value and the rule that it breaks."""
    given = {name.removeprefix(PREFIX): value for name, value in args.items() if name.startswith(PREFIX)}
    try:
        return config.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = [_flag(str(first["loc"][0])), str(first["input"])] if first["loc"] else []
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{' '.join(place)}: {message[0].lower()}{message[1:]}".removeprefix(": ")) from None


def default_suffix(config: Strict) -> str:
    """Of a file name: `-k10` for each option that is not at its default, so that no report replaces another."""
    return "".join(f"-{name}{_word(value)}" for name, value in changed(config).items())


def changed(config: Strict, mode: Literal["python", "json"] = "python") -> dict[str, Any]:
    """The options that are not at their defaults."""
    fields = type(config).model_fields
    names = [name for name, value in config.model_dump().items() if value != fields[name].default]
    return {name: value for name, value in config.model_dump(mode=mode).items() if name in names}


def _word(value: Any) -> str:
    """Of a file name."""
    if isinstance(value, PurePath):
        value = value.name
    text = "+".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
    return text.replace(" ", "").replace("/", "_")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _kind(annotation: Any) -> tuple[Any, bool]:
    """The type of one value, and whether the field takes several: `int | None` is int, `tuple[float, ...]` float."""
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) in (tuple, list):
        return get_args(annotation)[0], True
    return annotation, False
