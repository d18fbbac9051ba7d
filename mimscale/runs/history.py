"""What a run's metrics.jsonl and launches.jsonl say, in the order in which it counts. Trusts neither file.

A step that was redone, after a resume or a roll-back, counts as its last line says it; the lines before are kept apart
as discarded (redone.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mimscale.errors import without_secrets
from mimscale.files.eval_reports import BROKEN, parsed
from mimscale.files.metrics_lines import STAMPS, figures
from mimscale.files.plain_numbers import number, whole
from mimscale.files.regular import read_regular
from mimscale.runs.redone import Redone

EVALS = "evals/"
"""Begins the names of what was measured while a run trained."""


class Row(NamedTuple):
    """One line of metrics. hours: that the run had run by then (History)."""

    step: int
    hours: float
    values: Mapping[str, float]


class Event(NamedTuple):
    """Something that happened once."""

    kind: str
    step: int
    hours: float
    text: str


@dataclass
class History:
    """rows: steps ascend. evals: the same for figures of the student, whose names begin with EVALS. discarded: what was
    redone, as pieces in which steps ascend. launches: lines of launches.jsonl. startup: phase -> seconds until the
    first step of the last launch. unreadable: number of lines that are none, but for a last one that is cut off, as of
    a run that writes it or was killed.

    hours: the sum over the launches of the `uptime_s` that each logged last. So neither the pauses between launches
    count nor what a clock jumps when it is set, forth or back, nor the sleep of a machine; nor what a launch did after
    its last line.
    """

    rows: list[Row] = field(default_factory=list)
    evals: list[Row] = field(default_factory=list)
    discarded: list[list[Row]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    launches: list[dict[str, Any]] = field(default_factory=list)
    startup: dict[str, float] = field(default_factory=dict)
    unreadable: int = 0
    hours: float = 0.0


def read(run_dir: Path) -> History:
    """Of a run's folder; what is not there is empty. Raises OSError for files that cannot be read."""
    history = History()
    lines, history.unreadable = _lines(run_dir / "metrics.jsonl")
    history.launches, broken = _lines(run_dir / "launches.jsonl")
    history.unreadable += broken
    redone = Redone()
    counted = [redone.counts(line) for line in reversed(lines)][::-1]
    before_s, uptime_s, latest = 0.0, 0.0, 0
    pieces = _Pieces(history.discarded)
    for line, counts in zip(lines, counted, strict=True):
        event = line.get("event")
        if event == "start":
            before_s, uptime_s = before_s + uptime_s, 0.0
        uptime_s = max(uptime_s, number(line.get("uptime_s")) or 0.0)
        history.hours = (before_s + uptime_s) / 3600
        if event is not None:
            _take(history, line, latest, counts)
            continue
        step = whole(line.get("step"))
        if step is None:
            history.unreadable += 1
            continue
        row, latest = Row(step, history.hours, dict(_numbers(figures(line)))), step
        if counts:
            history.rows.append(row)
            pieces.end()
        else:
            pieces.add(row)
    return history


class _Pieces:
    """Rows that do not count, in pieces that can be drawn as curves."""

    def __init__(self, pieces: list[list[Row]]) -> None:
        self._pieces, self._open = pieces, False

    def add(self, row: Row) -> None:
        if not self._open or self._pieces[-1][-1].step >= row.step:
            self._pieces.append([])
        self._open = True
        self._pieces[-1].append(row)

    def end(self) -> None:
        self._open = False


def _take(history: History, line: Mapping[str, Any], latest: int, counts: bool) -> None:
    """An event. latest: the step that was logged last."""
    name, at = line["event"], whole(line.get("at"))
    step = latest if at is None else at
    if name == "evals" and counts:
        values = {EVALS + k: v for k, v in _numbers(figures(line))}
        if history.evals and history.evals[-1].step == step:  # of several protocols at one step
            values = {**history.evals.pop().values, **values}
        history.evals.append(Row(step, history.hours, values))
    if name == "first_step":
        history.startup = dict(_numbers(line["seconds"])) if isinstance(line.get("seconds"), Mapping) else {}
    elif name == "start":
        again = any(event.kind in ("start", "restart") for event in history.events)
        kind, text = ("restart", f"started again at step {step:,}") if again else ("start", f"started at step {step:,}")
        history.events.append(Event(kind, step, history.hours, text))
    elif isinstance(name, str):
        history.events.append(Event(name, step, history.hours, _text(name, line)))


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
    kept = {k: v for k, v in line.items() if k not in ("event", "at", *STAMPS, "keys", "batches", "stalled_s")}
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


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(mappings, how many other lines there are); a last line that is cut off is left out."""
    try:
        data = read_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        return [], 0
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
            broken += index < len(parts) - 1
        else:
            found.append(value)
    return found, broken


def _numbers(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in line.items():
        if value is None or number(value) is not None:
            yield key, math.nan if value is None else float(value)
