"""File names as text. Names are bytes to the system: Python holds what is not UTF-8 as surrogates, which no file of
ours can store and no terminal can show."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

from mimscale.errors import printable


def utf8(name: str) -> str:
    """The name with `\\xe9` for each byte that is not UTF-8. Other names are unchanged."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace") if _odd(name) else name


def one_line(name: str) -> str:
    """The name as messages show it: as `printable`, on one line, with bytes for what is not UTF-8."""
    return printable(utf8(name)).replace("\n", "\\n").replace("\t", "\\t")


def storable(value: Any) -> Any:
    """The value with `utf8` applied to all of its texts."""
    if isinstance(value, str):
        return utf8(value)
    if isinstance(value, dict):
        return {storable(key): storable(item) for key, item in value.items()}
    return [storable(item) for item in value] if isinstance(value, list | tuple) else value


Text = Annotated[str, BeforeValidator(storable)]
Options = Annotated[dict[str, Any], BeforeValidator(storable)]


def _odd(name: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in name) if not name.isascii() else False
