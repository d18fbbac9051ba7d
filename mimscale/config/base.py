"""What every section of a recipe is made of. No torch here, nor in any `config.py` of the packages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from mimscale.config.key_texts import key_texts
from mimscale.errors import is_address, without_secrets

Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]

LARGEST = 1e12
"""No number of a recipe is larger: what is, is a slip of the keyboard, and would overflow somewhere later."""


class Strict(BaseModel):
    """A section: unknown keys are errors, numbers are finite and at most LARGEST, values do not change after
    validation.

    The docstring of a subclass describes its keys, in sentences such as "every: steps between saves." (`key_texts`).
    They become the fields' descriptions; a key that a subclass declares again keeps its parent's, unless it has
    another.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        own = key_texts(cls.__doc__, cls.model_fields)[1]
        inherited = dict[str, str | None]()  # of keys that this class declares again
        for parent in reversed(cls.__mro__[1:]):
            if issubclass(parent, BaseModel):
                inherited |= {name: field.description for name, field in parent.model_fields.items()}
        for name, field in cls.model_fields.items():
            field.description = own.get(name) or field.description or inherited.get(name)

    @field_validator("*", mode="wrap")
    @classmethod
    def _true_is_no_number(cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        """Pydantic takes true for 1, and YAML takes yes and off for true and false."""
        result = handler(value)
        given, taken = (list(v) if isinstance(v, (list, tuple)) else [v] for v in (value, result))
        unread = any(isinstance(each, bool) for each in given) and given == taken  # else a validator understood it
        if unread and not _admits_bool(cls.model_fields[info.field_name or ""].annotation):
            shown = str(value).lower()
            raise ValueError(f"{shown} is no number or text; YAML reads yes, no, on and off as true and false")
        return result

    @field_validator("*", mode="after")
    @classmethod
    def _holds_no_secret(cls, value: Any) -> Any:
        """The recipe is kept in the run folder, and printed."""
        for text in _texts_in(value):
            shown = without_secrets(str(text))
            if isinstance(text, Path) and is_address(text):
                raise ValueError(f"'{shown}' is an address; give a path of this machine")
            if isinstance(text, str) and shown != text:
                raise ValueError(
                    f"'{shown}' was given with credentials in it; remove them and set them in the environment"
                )
        return value

    @model_validator(mode="after")
    def _numbers_are_sane(self) -> Strict:
        for place, number in numbers_in(dict(self)):
            if abs(number) > LARGEST:
                raise ValueError(f"{place} = {number:g}: a number must be at most {LARGEST:g}; correct it")
        return self


def _admits_bool(annotation: Any) -> bool:
    inner = get_args(annotation)
    return annotation in (bool, Any) or any(_admits_bool(each) for each in inner)


def _texts_in(value: Any) -> Iterator[str | Path]:
    """Every text and path in plain values, keys too; sections inside are left to themselves."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from (*_texts_in(key), *_texts_in(inner))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts_in(inner)
    elif isinstance(value, (str, Path)):
        yield value


def numbers_in(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """(place, number) of every number in plain values; sections inside are left to themselves."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from numbers_in(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from numbers_in(inner, f"{place}.{index}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield place, value
