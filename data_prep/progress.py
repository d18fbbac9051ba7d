"""Progress of a long command: a bar with rate and remaining time on a terminal, a line every 30 s in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mimscale.files.console import plain_console

LINE_EVERY_S = 30.0


@contextmanager
def progress(what: str, total: int, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """A function to be called with the number of units that were completed. Output goes to stderr."""
    console = plain_console(stderr=True)
    start, done, last_line = time.monotonic(), 0, time.monotonic()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total, rate="")

        def advance(units: int) -> None:
            nonlocal done, last_line
            done += units
            now = time.monotonic()
            rate = done / max(now - start, 1e-6)
            bar.update(task, completed=done, rate=f"{rate:,.0f} {unit}/s")
            if not console.is_terminal and now - last_line > LINE_EVERY_S:
                last_line = now
                left = time.strftime("%H:%M:%S", time.gmtime((total - done) / rate))
                console.print(f"{what}: {done:,} of {total:,}, {rate:,.0f} {unit}/s, {left} left", soft_wrap=True)

        yield advance
