"""What a run's metrics.jsonl and launches.jsonl say, in the order in which it counts. Trusts neither file.

A step that was redone, after a resume or a roll-back, counts as its last line says it; the lines before are kept apart
as discarded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mimscale.errors import without_secrets
from mimscale.files.eval_reports import BROKEN, parsed
from mimscale.files.plain_numbers import number, whole
from mimscale.files.regular import read_regular

EVALS = "evals/"
"""Begins the names of what was measured while a run trained."""


class Row(NamedTuple):
    """One line of metrics. hours: that the run had run by then; the pauses between launches do not count."""

    step: int
    hours: float
    values: Mapping[str, float]


class Event(NamedTuple):
    """Something that happened once. back_to: of a roll-back and a restart, the step from which the run went on."""

    kind: str
    step: int
    hours: float
    text: str
    time: float
    back_to: int | None = None


@dataclass
class History:
    """rows: steps ascend. evals: the same for figures of the student, whose names begin with EVALS. discarded: what was
    redone, one list per time. launches: lines of launches.jsonl. unreadable: number of lines that are none. torn:
    whether the last line is not whole, as of a run that is being written or was killed. last_s: seconds since 1970 of
    the last line.
    """

    rows: list[Row] = field(default_factory=list)
    evals: list[Row] = field(default_factory=list)
    discarded: list[list[Row]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    launches: list[dict[str, Any]] = field(default_factory=list)
    startup: dict[str, float] = field(default_factory=dict)
    unreadable: int = 0
    torn: bool = False
    last_s: float | None = None
    hours: float = 0.0


def read(run_dir: Path) -> History:
    """Of a run's folder; what is not there is empty. Raises OSError for files that cannot be read."""
    history = History()
    lines, history.unreadable, history.torn = _lines(run_dir / "metrics.jsonl")
    history.launches, broken, _ = _lines(run_dir / "launches.jsonl")
    history.unreadable += broken
    begun = [launch for launch in history.launches if number(launch.get("time")) is not None]
    waiting, clock_s, start_s = sorted(begun, key=lambda launch: launch["time"]), 0.0, None
    for line in lines:
        time_s = number(line.get("time"))
        while waiting and (time_s is None or waiting[0]["time"] <= time_s):
            launch = waiting.pop(0)
            start_s = launch["time"]
            _begin(history, launch, clock_s)
        if time_s is not None:
            clock_s += max(0.0, time_s - start_s) if start_s is not None else 0.0
            start_s = history.last_s = time_s
        _take(history, line, clock_s / 3600)
    for launch in waiting:
        _begin(history, launch, clock_s)
    history.hours = clock_s / 3600
    return history


def _begin(history: History, launch: Mapping[str, Any], clock_s: float) -> None:
    step = whole(launch.get("step")) or 0
    again = any(event.kind in ("start", "restart") for event in history.events)
    _discard(history, step)
    kind, text = ("restart", f"started again at step {step:,}") if again else ("start", f"started at step {step:,}")
    history.events.append(Event(kind, step, clock_s / 3600, text, launch["time"], step if again else None))


def _take(history: History, line: Mapping[str, Any], hours: float) -> None:
    name, time_s = line.get("event"), number(line.get("time")) or 0.0
    if name is None:
        step = whole(line.get("step"))
        if step is None:
            history.unreadable += 1
            return
        if history.rows and history.rows[-1].step >= step:  # redone, and no launch says so
            _discard(history, step - 1)
        values = {k: v for k, v in _numbers(line) if k not in ("step", "time")}
        history.rows.append(Row(step, hours, values))
        return
    latest = history.rows[-1].step if history.rows else 0
    at = whole(line.get("at"))
    step = latest if at is None else at
    if name == "evals":
        values = {EVALS + k: v for k, v in _numbers(line) if k not in ("at", "time", "seconds")}
        history.evals = [row for row in history.evals if row.step < step]
        history.evals.append(Row(step, hours, values))
    elif name == "first_step" and isinstance(line.get("seconds"), Mapping):
        history.startup = dict(_numbers(line["seconds"]))
    back_to = whole(line.get("to")) if name == "rollback" else None
    if isinstance(name, str) and name != "first_step":
        history.events.append(Event(name, step, hours, _text(name, line), time_s, back_to))
    if back_to is not None and back_to < step:
        _discard(history, back_to)


def _discard(history: History, step: int) -> None:
    """What was logged after a step counts no more."""
    gone = [row for row in history.rows if row.step > step]
    if gone:
        history.rows = [row for row in history.rows if row.step <= step]
        history.discarded.append(gone)
    history.evals = [row for row in history.evals if row.step <= step]


def _text(name: str, line: Mapping[str, Any]) -> str:
    """An event's values in words, for a person."""
    words = {
        "saved": "checkpoint saved",
        "save_failed": "checkpoint could not be saved",
        "save_skipped": "checkpoint left out, the last one was still being written",
        "skipped": "step skipped",
        "rollback": "rolled back",
        "stopped": "stopped",
        "evals": "evaluated",
        "evals_failed": "evaluation failed",
        "panel_failed": "panel could not be drawn",
        "tracker_failed": "tracker given up",
        "damaged": "sample could not be used",
        "slow_rank": "ranks differ",
    }
    kept = {k: v for k, v in line.items() if k not in ("event", "time", "at", "keys", "batches", "stalled_s")}
    plain = ("why", "error", "line", "reason")
    shown = [
        _shown(v) if k in plain else f"{k} {_shown(v)}"
        for k, v in kept.items()
        if isinstance(v, str | int | float) and v != ""
    ]
    return without_secrets(": ".join(filter(None, (words.get(name, name), ", ".join(shown)))))[:300]


def _shown(value: str | int | float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def columns(rows: Sequence[Row]) -> list[str]:
    """Names of all numbers in rows, in the order in which they appear."""
    return list(dict.fromkeys(name for row in rows for name in row.values))


def _lines(path: Path) -> tuple[list[dict[str, Any]], int, bool]:
    """(mappings, how many other lines there are, whether the last line is cut off)."""
    try:
        data = read_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        return [], 0, False
    found, broken = list[dict[str, Any]](), 0
    parts = data.split(b"\n")
    for index, part in enumerate(parts):
        if not part.strip():
            continue
        try:
            value = parsed(part.decode())
            if not isinstance(value, dict):
                raise ValueError("no mapping")
        except BROKEN:
            if index == len(parts) - 1:
                return found, broken, True
            broken += 1
        else:
            found.append(value)
    return found, broken, False


def _numbers(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in line.items():
        if value is None or number(value) is not None:
            yield key, math.nan if value is None else float(value)
