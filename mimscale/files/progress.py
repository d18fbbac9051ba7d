"""How far a long piece of work is: a bar on a terminal, a line now and then in a log. All of it goes to stderr."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mimscale.errors import warn
from mimscale.files.console import plain_console
from mimscale.files.durations import duration

T = TypeVar("T")
LINE_EVERY_S = 30.0
"""Between two lines in a log."""
FIRST_LINE_S = 3.0
"""Until the first line where nobody knows how long it takes."""
DRAW_EVERY_S = 0.1


def no_progress(units: int) -> None:
    """For a caller that shows nothing."""


@contextmanager
def progress(what: str, total: int, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """A function to be called with the number of units that were completed; it may be called for each of millions.

    total: 0 = unknown.
    """
    console = plain_console(stderr=True)
    start = drawn = time.monotonic()
    done, next_line = 0, start + (LINE_EVERY_S if total else FIRST_LINE_S)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    options = {"console": console, "disable": not console.is_terminal, "redirect_stdout": False}
    with Progress(*columns, **options) as bar:  # type: ignore[arg-type]
        task = bar.add_task(what, total=total or None, rate="")

        def draw() -> None:
            bar.update(task, completed=done, rate=f"{done / max(time.monotonic() - start, 1e-6):,.0f} {unit}/s")

        def advance(units: int) -> None:
            nonlocal done, drawn, next_line
            done += units
            now = time.monotonic()
            if console.is_terminal and now > drawn + DRAW_EVERY_S:
                drawn = now
                draw()
            if not console.is_terminal and now > next_line:
                next_line = now + LINE_EVERY_S
                rate = done / max(now - start, 1e-6)
                left = f", {duration(max(0, total - done) / rate)} left" if total and rate else ""
                of = f" of {total:,} {unit}" if total else f" {unit}"
                warn(f"{what}: {done:,}{of}, {rate:,.3g} {unit}/s{left}")

        yield advance
        draw()


def tracked(items: Iterable[T], total: int, what: str, unit: str) -> Iterator[T]:
    """The items, as they come. total: how many there will be."""
    with progress(what, total, unit) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def working(what: str, *, moving: bool = True) -> Iterator[None]:
    """Around work whose end nobody can count: how long it has taken. moving: on a terminal a spinner; without it lines
    there too, because drawing takes CPU time, which a benchmark would count.
    """
    console = plain_console(stderr=True)
    if moving and console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bar:
            bar.add_task(what, total=None)
            yield
        return
    start, ended = time.monotonic(), threading.Event()

    def speak() -> None:
        wait_s = FIRST_LINE_S
        while not ended.wait(wait_s):
            warn(f"{what}: {duration(time.monotonic() - start)} so far")
            wait_s = LINE_EVERY_S

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
