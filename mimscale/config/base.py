"""What every section of a recipe is made of. No torch here, nor in any `config.py` of the packages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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

    @model_validator(mode="after")
    def _numbers_are_sane(self) -> Strict:
        for place, number in numbers_in(dict(self)):
            if abs(number) > LARGEST:
                raise ValueError(f"{place} = {number:g}: a number must be at most {LARGEST:g}; correct it")
        return self


def _admits_bool(annotation: Any) -> bool:
    inner = get_args(annotation)
    return annotation in (bool, Any) or any(_admits_bool(each) for each in inner)


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
