"""Class labels by their values: 2, 2.0 and "2" are class 2; -1, an empty field and NaN are no label."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from mimscale.data.names import one_line
from mimscale.errors import UserError

MAX_CLASSES = 1_000_000  # a larger number is an id, and a list of that many names would fill the memory
INFINITE = ("inf", "-inf", "+inf", "infinity", "-infinity", "+infinity")
MISSING = ("", "nan", "-nan", "none", "null", "<na>", "n/a", "#n/a")  # as pandas, pyarrow and Excel write it
_WHOLE = re.compile(r"([+-]?\d{1,30})(?:\.0*)?")
_COMMA = re.compile(r"[+-]?\d+(?:,\d+)+")  # 3,0 or 1,000, which would be sorted as text
_NUMBER = re.compile(r"[+-]?[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?")


def label_value(value: object, names: Collection[str] = ()) -> int | float | str | None:
    """A number, a name, or None for no label. A float is one that is no whole number. names: that are classes even if
    they read like no label, such as none.
    """
    if value is None or isinstance(value, bool):
        return None if value is None else int(value)
    text = (value.decode("utf-8-sig", "replace") if isinstance(value, bytes) else str(value)).strip()
    if text.lower() in MISSING:
        return text if text and text in names else None
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


def classes_of(
    labels: Iterable[str], where: str, known: Sequence[str] | None = None
) -> tuple[list[str], dict[str, int]]:
    """(names of the classes, text of a label -> class index) of labels that all have a value; where: for messages.

    If all are numbers, they are the class indices; otherwise the classes are the sorted names. known: the names of the
    classes, in the order of the class index; then a label is an index or one of them. Raises UserError.
    """
    values = {text: label_value(text, known or ()) for text in labels}
    distinct = set(values.values())
    numbers = [value for value in distinct if isinstance(value, int | float)]
    if known is not None:
        return list(known), _known_indices(values, distinct, where, known)
    infinite = [text for text, value in values.items() if isinstance(value, str) and value.lower() in INFINITE]
    if numbers and len(numbers) + len({values[text] for text in infinite}) == len(distinct):
        for text in infinite:
            raise UserError(f"{where}: label {one_line(text)} is no whole number; see --label")
    if all(isinstance(value, str) and _COMMA.fullmatch(value) for value in distinct):
        text = next(iter(values))
        raise UserError(
            f"{where}: label '{one_line(text)}' has a comma, as whole numbers in another notation; write them as 3, or "
            "give the names of all classes with --classes FILE"
        )
    if len(numbers) < len(distinct):
        names = {text: str(value) for text, value in values.items()}
        classes = sorted(set(names.values()))
        _refuse_renumbering(numbers, classes, where)
        if len(classes) > MAX_CLASSES:
            raise UserError(f"{where}: {len(classes):,} different labels, more than {MAX_CLASSES:,}; see --label")
        index = {name: number for number, name in enumerate(classes)}
        return classes, {text: index[name] for text, name in names.items()}
    for number in numbers:
        check_class(number, f"{where}, {len(distinct):,} different labels")
    classes = [str(number) for number in range(int(max(numbers)) + 1)]
    return classes, {text: int(value) for text, value in values.items() if value is not None}


def _refuse_renumbering(numbers: Sequence[int | float], classes: Sequence[str], where: str) -> None:
    """Among names, a number must be the class that it says, as digits before letters are. Raises UserError."""
    index = {name: number for number, name in enumerate(classes)}
    moved = sorted(number for number in numbers if index[str(number)] != number)
    if moved:
        name = next(name for name in classes if not isinstance(label_value(name), int | float))
        raise UserError(
            f"{where}: some labels are numbers and others names, for example '{one_line(name)}', and {moved[0]} would "
            f"become class {index[str(moved[0])]}; correct them, or give the names of all classes with --classes FILE"
        )


def _known_indices(
    values: Mapping[str, int | float | str | None], distinct: Collection[object], where: str, known: Sequence[str]
) -> dict[str, int]:
    check_names(known, f"{where}: ")
    index = {name: number for number, name in enumerate(known)}
    unknown = sorted(str(value) for value in distinct if isinstance(value, str) and value not in index)
    if unknown:
        raise UserError(
            f"{where}: {len(unknown):,} labels are not among the {len(known):,} class names, the first is "
            f"'{one_line(unknown[0])}'; complete the list of classes, or see --label"
        )
    named = any(isinstance(value, str) for value in distinct)  # then a number may be a name too
    result = {}
    for text, value in values.items():
        name = value if isinstance(value, str) else text.strip()
        if isinstance(value, str) or (named and name in index):
            result[text] = index[name]
        else:
            result[text] = check_class(value or 0, where)
        if result[text] >= len(known):
            raise UserError(
                f"{where}: label {result[text]:,} has no name among the {len(known):,} class names; complete that list"
            )
    return result


def check_names(known: Sequence[str], where: str = "") -> None:
    """Raises UserError if two classes have one name, or one has none."""
    if len(set(known)) < len(known):
        twice = Counter(known).most_common(1)[0][0]
        raise UserError(f"{where}the class name '{one_line(twice)}' is given twice; each class has one name")
    if any(not name.strip() for name in known):
        number = next(number for number, name in enumerate(known) if not name.strip())
        raise UserError(f"{where}class {number} has an empty name; remove that line, or name the class")


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
