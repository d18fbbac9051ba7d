"""One run's folder as plain values: what the page and --json are made of. Reads only; trusts no file."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from mimscale.config.recipe_table import Header, header_of, student_name
from mimscale.config.recipes import recipe_names
from mimscale.errors import UserError, printable, without_secrets
from mimscale.evals import results
from mimscale.files.regular import read_regular
from mimscale.report import history as histories
from mimscale.report.history import History

OF_A_RUN = ("metrics.jsonl", "launches.jsonl", "config.yaml")
SILENT_S = 600.0
"""A run that has written nothing for so long, or for ten of its log intervals, is taken for ended."""


@dataclass(frozen=True)
class Run:
    """name: short, and unlike those of the runs beside it. recipe: resolved, `section.key` -> value. results: as
    `mimscale results` gathers them. header: of the recipe of this package that the run was started with. notes: what
    could not be read.
    """

    path: Path
    name: str
    history: History
    recipe: Mapping[str, Any]
    results: Mapping[str, Any]
    header: tuple[str, Header] | None
    state: str
    status: str
    total: int | None
    notes: Sequence[str]


def read(path: Path, name: str, now_s: float | None = None) -> Run:
    """Raises UserError for what is no run."""
    shown = printable(str(path))
    if not path.is_dir():
        raise UserError(f"{shown} is no folder; name the folders of runs, and the page last, such as report.html")
    if not any((path / file).is_file() for file in OF_A_RUN):
        raise UserError(f"{shown} is no run: it holds none of {', '.join(OF_A_RUN)}; name the folder of a run")
    notes: list[str] = []
    try:
        history = histories.read(path)
    except OSError as error:
        raise UserError(f"{printable(str(error.filename))} cannot be read ({error.strerror}); repair it") from None
    if history.unreadable:
        notes.append(f"{history.unreadable} lines of metrics.jsonl or launches.jsonl are no entries; left out")
    values = _recipe(path / "config.yaml", notes)
    try:
        expected = results.expected_values(path, None)
    except UserError as error:
        expected = {}
        notes.append(f"expected values are left out: {error}")
    found = results.gather(path, expected)
    notes += [f"{line}; left out" for line in found["unreadable"]]
    total = _total(values, history)
    state, status = _status(path, history, values, time.time() if now_s is None else now_s)
    header, recipe = _header(history), {key: clean(value) for key, value in flat(values).items()}
    return Run(path, name, history, recipe, found, header, state, status, total, [clean(note) for note in notes])


def names(paths: Sequence[Path]) -> list[str]:
    """For each folder the shortest end of its path that no other has; a number where one is named twice."""
    parts = [path.resolve().parts for path in paths]
    chosen: list[str] = []
    for own in parts:
        others = [other for other in parts if other != own]
        length = next(n for n in count(1) if n >= len(own) or all(other[-n:] != own[-n:] for other in others))
        name = clean("/".join(own[-length:]))
        chosen.append(name if name not in chosen else f"{name} ({len(chosen) + 1})")
    return chosen


def clean(value: Any) -> Any:
    """A value for the eyes of others: no secrets of URLs, and no characters that a page or a terminal obeys."""
    if isinstance(value, Mapping):
        return {clean(str(key)): clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [clean(inner) for inner in value]
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return printable(without_secrets(str(value)))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections -> `section.key` -> value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """`section.key` -> its value in each run (None: absent), where they are not all the same."""
    keys = dict.fromkeys(key for run in runs for key in run.recipe)
    rows = {key: [run.recipe.get(key) for run in runs] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def setup_line(run: Run) -> str:
    """Method and student in a few words; empty without a recipe."""
    recipe = run.recipe
    if "method.name" not in recipe:
        return ""
    student = {key.removeprefix("student."): value for key, value in recipe.items() if key.startswith("student.")}
    try:
        student_words = student_name(student, any(key.startswith("method.stages") for key in recipe))
    except (KeyError, TypeError, IndexError):
        student_words = ""
    teachers = [str(value) for key, value in recipe.items() if key.startswith("teachers.") and key.endswith(".model")]
    words = [str(recipe["method.name"]), student_words, f"teacher {', '.join(teachers)}" if teachers else ""]
    return " · ".join(word for word in words if word)


def summary(run: Run) -> dict[str, Any]:
    """What --json prints of a run: plain values, null where unknown."""
    history = run.history
    last = history.rows[-1] if history.rows else None
    batch = run.recipe.get("schedule.global_batch")
    kinds = [event.kind for event in history.events]
    numbers = {} if last is None else {key: _finite(value) for key, value in last.values.items()}
    return {
        "run": str(run.path),
        "name": run.name,
        "state": run.state,
        "status": run.status,
        "step": last.step if last else 0,
        "total_steps": run.total,
        "samples": last.step * batch if last and isinstance(batch, int) else None,
        "hours": round(history.hours, 4),
        "last": clean(numbers),
        "evals": clean(
            {k.removeprefix(histories.EVALS): _finite(v) for k, v in history.evals[-1].values.items()}
            if history.evals
            else {}
        ),
        "events": {clean(kind): kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "discarded_lines": sum(map(len, history.discarded)),
        "launches": clean(history.launches),
        "startup_s": history.startup,
        "figures": clean(run.results["figures"]),
        "expected": clean(run.results["expected"]),
        "recipe_name": None if run.header is None else run.header[0],
        "published": None if run.header is None else run.header[1].result,
        "source": None if run.header is None else run.header[1].source,
        "recipe": dict(run.recipe),
        "notes": list(run.notes),
    }


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def _recipe(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(read_regular(path))
    except FileNotFoundError:
        notes.append("config.yaml is missing: the recipe is not known")
        return {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        notes.append(f"config.yaml cannot be read ({' '.join(str(error).split())[:120]}): the recipe is not known")
        return {}
    if not isinstance(values, dict):
        notes.append("config.yaml is no mapping: the recipe is not known")
        return {}
    return values


def _total(values: Mapping[str, Any], history: History) -> int | None:
    """Optimiser steps of the whole run; from epochs by what the log says an epoch has."""
    schedule = values.get("schedule")
    schedule = schedule if isinstance(schedule, Mapping) else {}
    if isinstance(schedule.get("steps"), int):
        return int(schedule["steps"])
    epochs = schedule.get("epochs")
    per_epoch = [row.step / row.values["epoch"] for row in history.rows[-1:] if row.values.get("epoch", 0) > 0]
    return round(epochs * per_epoch[0]) if isinstance(epochs, int | float) and per_epoch else None


def _status(path: Path, history: History, values: Mapping[str, Any], now_s: float) -> tuple[str, str]:
    """(done, running, stopped or ended, the same in words)."""
    step = history.rows[-1].step if history.rows else 0
    if (path / "done").is_file():
        return "done", "done"
    if (path / "guard.json").is_file():
        return "ended", f"ended by the guard near step {step:,}: too many bad steps in a row"
    last = history.events[-1] if history.events else None
    if last is not None and last.kind == "stopped":
        return "stopped", f"{last.text}, step {last.step:,}"
    begun = [launch["time"] for launch in history.launches if isinstance(launch.get("time"), int | float)]
    seen = max([*([history.last_s] if history.last_s is not None else []), *begun], default=None)
    if seen is None:
        return "ended", "not started"
    gaps = [(b.hours - a.hours) * 3600 for a, b in zip(history.rows[-11:], history.rows[-10:], strict=False)]
    silent_s = now_s - seen
    if silent_s <= max(SILENT_S, 10 * max(gaps, default=0.0)):
        return "running", f"running, or ended less than {max(1, round(silent_s / 60))} min ago without saying so"
    return "ended", f"ended at step {step:,} without saying why (killed or crashed), {_age(silent_s)} ago"


def _age(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 60:.0f} min"


def _header(history: History) -> tuple[str, Header] | None:
    """Of the first launch's recipe, where it is one of this package."""
    known = set(recipe_names())
    for launch in history.launches[:1]:
        command = launch.get("command")
        for word in command if isinstance(command, list) else ():
            if isinstance(word, str) and word in known:
                try:
                    text = resources.files("mimscale.recipes").joinpath(f"{word}.yaml").read_text()
                    return word, header_of(text)
                except ValueError:
                    return None
    return None
