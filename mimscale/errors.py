"""The exceptions that a user is meant to read. Both carry one line."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class UserError(ValueError):
    """Bad input from outside. The message is one line: the value, the rule, the fix. The command line exits with 2."""


class Stopped(RuntimeError):
    """A run that ended itself on purpose, for a reason that starting it again would not remove. Exit code 4."""

    code = 4


def nearest(word: str, known: Sequence[str]) -> str:
    """The end of a refusal: the known word that may have been meant, else all of them."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; choose one of {', '.join(known)}"
