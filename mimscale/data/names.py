"""File names as text. Names are bytes to the system: Python holds what is not UTF-8 as surrogates, which no file of
ours can store and no terminal can show."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator


def utf8(name: str) -> str:
    """The name with `\\xe9` for each byte that is not UTF-8. Other names are unchanged."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace") if _odd(name) else name


def printable(name: str) -> str:
    """The name on one line: as `utf8`, and with escapes for line ends, controls and characters that cannot be seen."""
    text = utf8(name)
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


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


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
