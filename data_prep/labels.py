"""Class labels by their values: 2, 2.0 and "2" are class 2; -1, an empty field and NaN are no label."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from mimscale.errors import UserError

MAX_CLASSES = 1_000_000  # a larger number is an id, and a list of that many names would fill the memory
MISSING = ("", "nan", "none", "null", "<na>")  # as pandas and pyarrow write a missing value
_WHOLE = re.compile(r"([+-]?\d{1,30})(?:\.0*)?")
_NUMBER = re.compile(r"[+-]?[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?")


def label_value(value: object) -> int | float | str | None:
    """A number, a name, or None for no label. A float is one that is no whole number."""
    if value is None or isinstance(value, bool):
        return None if value is None else int(value)
    text = (value.decode(errors="replace") if isinstance(value, bytes) else str(value)).strip()
    if text.lower() in MISSING:
        return None
    whole = _WHOLE.fullmatch(text) if text.isascii() else None
    number: int | float
    if whole:
        number = int(whole[1])
    elif not _NUMBER.fullmatch(text):
        return text
    else:
        number = float(text)
        number = int(number) if math.isfinite(number) and number.is_integer() else number
    return None if number == -1 else number


def classes_of(labels: Iterable[str], where: str) -> tuple[list[str], dict[str, int]]:
    """(names of the classes, text of a label -> class index) of labels that all have a value; where: for messages.

    If all are numbers, they are the class indices; otherwise the classes are the sorted names. Raises UserError.
    """
    values = {text: label_value(text) for text in labels}
    distinct = set(values.values())
    numbers = [value for value in distinct if isinstance(value, int | float)]
    if len(numbers) < len(distinct):
        names = {text: str(value) for text, value in values.items()}
        classes = sorted(set(names.values()))
        if len(classes) > MAX_CLASSES:
            raise UserError(f"{where}: {len(classes):,} different labels, more than {MAX_CLASSES:,}; see --label")
        index = {name: number for number, name in enumerate(classes)}
        return classes, {text: index[name] for text, name in names.items()}
    for number in numbers:
        check_class(number, f"{where}, {len(distinct):,} different labels")
    classes = [str(number) for number in range(int(max(numbers)) + 1)]
    return classes, {text: int(value) for text, value in values.items() if value is not None}


def check_class(number: int | float, where: str) -> int:
    """The number if it can be a class index. Raises UserError."""
    if isinstance(number, float):
        raise UserError(f"{where}: label {number} is no whole number; see --label")
    if number < 0:
        raise UserError(f"{where}: label {number} is below 0; see --label")
    if number >= MAX_CLASSES:
        raise UserError(
            f"{where}: label {number:,} is an id, not a class index (at most {MAX_CLASSES - 1:,}); "
            "number the classes from 0, or see --label"
        )
    return number
