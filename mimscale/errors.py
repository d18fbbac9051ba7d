"""What a user is meant to read: two exceptions, each with one line, and warnings."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from contextlib import suppress


class UserError(ValueError):
    """Bad input from outside. The message is one line: the value, the rule, the fix. The command line exits with 2.

    everywhere: all ranks of a run raise the same, so that one of them prints it.
    """

    def __init__(self, *values: object, everywhere: bool = False) -> None:
        super().__init__(*(_one_line(value) if isinstance(value, str) else value for value in values))
        self.everywhere = everywhere


def _one_line(text: str) -> str:
    """Without secrets, and with `\\n` for the end of a line inside a value."""
    return without_secrets(text.strip().replace("\n", "\\n"))


class Stopped(RuntimeError):
    """A run that ended itself on purpose, for a reason that starting it again would not remove. Exit code 4."""

    code = 4


def nearest(word: str, known: Sequence[str]) -> str:
    """The end of a refusal: the known word that may have been meant, else all of them."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; choose one of {', '.join(known)}"


def printable(text: str) -> str:
    """Text that may hold names of others: `without_secrets`, and escaped what a terminal would obey or cannot show."""
    escaped = _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)
    return without_secrets(escaped)


def without_secrets(text: str) -> str:
    """The text with each URL in it cut down to scheme, host and path: a user, a query or a fragment may be a secret."""
    return _URL.sub(lambda match: match[1] + _bare(match[2]), text)


def _bare(rest: str) -> str:
    """What follows `scheme://`, without user, query and fragment."""
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    _, _, port = host.partition(":")
    unescaped = port and not port.isdecimal() and not host.startswith("[")  # of a password with / in it: S3's may have
    if "@" in host:
        rest = host.rpartition("@")[2] + rest[len(host) :]
    elif unescaped:
        rest = rest.rpartition("@")[2]
    return re.split(r"[?#]", rest, maxsplit=1)[0]


def is_address(path: object) -> bool:
    """Whether what is to be a path of this machine is a URL: it would become a folder named `s3:`."""
    return re.match(rf"(?:wds:)?(?:{_SCHEMES}|file):/", str(path), re.IGNORECASE) is not None


_SCHEMES = "https?|s3[an]?|gs|gcs|ftps?|sftp|ssh|hdfs|hf|az|abfss?"
_NO_NEXT = rf"(?!(?:::)?\b(?:{_SCHEMES}):/)"  # the next address in a list begins a match of its own
_URL = re.compile(  # `:/` is what pathlib leaves of `://`; a quote ends an address, not a password in it
    rf"((?<=[a-z0-9+.-])://|\b(?:{_SCHEMES}):/(?!/))((?:(?:{_NO_NEXT}[^\s/@])*@)?(?:{_NO_NEXT}[^\s'\"|])*)",
    re.IGNORECASE,
)
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ud800-\udfff\ufeff]"
)


def warn(text: str) -> None:
    """A line on stderr, which may lie on the same full disk."""
    with suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)
