"""How far a long piece of work is, and when it will end: a bar for a person who watches, lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import track

from mimscale.errors import warn
from mimscale.files.console import plain_console

T = TypeVar("T")
EVERY_S = 30.0  # between two lines in a file


def progress(items: Iterable[T], total: int, what: str, unit: str = "chunks") -> Iterator[T]:
    """The items, as they come. total: how many there will be. On a terminal a bar on stderr, else a line at times."""
    console = plain_console(stderr=True)
    if console.is_terminal:
        yield from track(items, what, total, console=console, transient=True)
        return
    start_s = said_s = time.monotonic()
    for done, item in enumerate(items, start=1):
        now_s = time.monotonic()
        if now_s - said_s >= EVERY_S and done < total:
            said_s = now_s
            warn(f"{what}: {done:,} of {total:,} {unit}, {time_text((now_s - start_s) / done * (total - done))} left")
        yield item


def time_text(seconds: float) -> str:
    """Seconds for a person: 40 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
