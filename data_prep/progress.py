"""Progress of a long command: a bar with rate and remaining time on a terminal, a line every 30 s in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mimscale.files.console import plain_console

FIRST_LINE_S, LINE_EVERY_S = 1.0, 30.0  # the first line comes early where nobody knows how long it takes


@contextmanager
def progress(what: str, total: int, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """A function to be called with the number of units that were completed. Output goes to stderr.

    total: 0 = unknown.
    """
    console = plain_console(stderr=True)
    start, done = time.monotonic(), 0
    next_line = start + (LINE_EVERY_S if total else FIRST_LINE_S)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total or None, rate="")

        def advance(units: int) -> None:
            nonlocal done, next_line
            done += units
            now = time.monotonic()
            rate = done / max(now - start, 1e-6)
            bar.update(task, completed=done, rate=f"{rate:,.0f} {unit}/s")
            if not console.is_terminal and now > next_line:
                next_line = now + LINE_EVERY_S
                left = time.strftime(", %H:%M:%S left", time.gmtime(max(0, total - done) / rate)) if total else ""
                of = f" of {total:,}" if total else f" {unit}"
                console.print(f"{what}: {done:,}{of}, {rate:,.0f} {unit}/s{left}", soft_wrap=True)

        yield advance
