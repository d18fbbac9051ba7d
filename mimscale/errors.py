"""What a user is meant to read: two exceptions, each with one line, and warnings."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from contextlib import suppress


class UserError(ValueError):
    """Bad input from outside. The message is one line: the value, the rule, the fix. The command line exits with 2."""


class Stopped(RuntimeError):
    """A run that ended itself on purpose, for a reason that starting it again would not remove. Exit code 4."""

    code = 4


def nearest(word: str, known: Sequence[str]) -> str:
    """The end of a refusal: the known word that may have been meant, else all of them."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; choose one of {', '.join(known)}"


def warn(text: str) -> None:
    """A line on stderr, which may lie on the same full disk."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
