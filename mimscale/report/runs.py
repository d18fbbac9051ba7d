"""One run's folder as plain values: what the page and --json are made of. Reads only; trusts no file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import count
from pathlib import Path
from typing import Any

from mimscale.config.difference import differences, flat
from mimscale.config.recipe_table import Header, header_of, student_name
from mimscale.config.recipes import recipe_names
from mimscale.errors import UserError, printable, without_secrets
from mimscale.evals import results
from mimscale.evals.config import Expected
from mimscale.runs import history as histories
from mimscale.runs.compare import recipe_of
from mimscale.runs.history import History
from mimscale.runs.summary import Summary, summary_of

OF_A_RUN = ("metrics.jsonl", "launches.jsonl", "config.yaml")


@dataclass(frozen=True)
class Run:
    """name: short, and unlike those of the runs beside it. summary: as `mimscale runs` has it. history: the whole log.
    recipe: resolved, `section.key` -> value. results: as `mimscale results` gathers them. header: of the recipe of this
    package that the run was started with. notes: what could not be read.
    """

    path: Path
    name: str
    summary: Summary
    history: History
    recipe: Mapping[str, Any]
    results: Mapping[str, Any]
    header: tuple[str, Header] | None
    notes: Sequence[str]

    @property
    def samples(self) -> int | None:
        """Seen so far; None: not known."""
        batch, step = self.recipe.get("schedule.global_batch"), self.summary.step
        return step * batch if isinstance(batch, int) and step is not None else None


def read(path: Path, name: str) -> Run:
    """Raises UserError for what is no run."""
    shown = printable(str(path))
    if not path.is_dir():
        raise UserError(f"{shown} is no folder; name the folders of runs, and the page last, such as report.html")
    if not any((path / file).is_file() for file in OF_A_RUN):
        raise UserError(f"{shown} is no run: it holds none of {', '.join(OF_A_RUN)}; name the folder of a run")
    try:
        history = histories.read(path)
    except OSError as error:
        raise UserError(f"{printable(str(error.filename))} cannot be read ({error.strerror}); repair it") from None
    summary, notes, recipe = summary_of(path), list[str](), dict[str, Any]()
    expected: Mapping[str, Expected] = {}
    if history.unreadable:
        notes.append(f"{history.unreadable} lines of metrics.jsonl or launches.jsonl are no entries; left out")
    try:
        recipe = flat(recipe_of(path))
    except UserError as error:
        notes.append(f"the recipe is not known: {error}")
    try:
        expected = results.expected_values(path, None)
    except UserError as error:
        notes.append(f"expected values are left out: {error}")
    found = results.gather(path, expected)
    notes += [f"{line}; left out" for line in dict.fromkeys([*summary.unreadable, *found["unreadable"]])]
    return Run(
        path,
        name,
        summary,
        history,
        {key: clean(value) for key, value in recipe.items()},
        found,
        _header(history),
        [clean(note) for note in notes],
    )


def names(paths: Sequence[Path]) -> list[str]:
    """For each folder the shortest end of its path that no other has; a number where one is named twice."""
    parts = [Path(os.path.realpath(path)).parts for path in paths]  # not resolve(), which fails for a loop of links
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


def recipe_differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """`section.key` -> its value in each run, where they are not all the same; without what papers report."""
    found = differences([run.recipe for run in runs])
    return {key: values for key, values in found.items() if not key.startswith("expected.")}


def setup_line(run: Run) -> str:
    """Method and student in a few words; empty without a recipe."""
    recipe = run.recipe
    if "method.name" not in recipe:
        return ""
    student = {key.removeprefix("student."): value for key, value in recipe.items() if key.startswith("student.")}
    try:
        student_words = student_name(
            student, any(key.startswith("method.stages") and recipe[key] is not None for key in recipe)
        )
    except (KeyError, TypeError, IndexError):
        student_words = ""
    teachers = [str(value) for key, value in recipe.items() if key.startswith("teachers.") and key.endswith(".model")]
    words = [str(recipe["method.name"]), student_words, f"teacher {', '.join(teachers)}" if teachers else ""]
    return " · ".join(word for word in words if word)


def plain(run: Run) -> dict[str, Any]:
    """What --json prints of a run: null where unknown."""
    summary, history = run.summary, run.history
    kinds = [event.kind for event in history.events]
    evals = history.evals[-1].values if history.evals else {}
    return {
        "run": str(run.path),
        "name": run.name,
        "status": summary.status,
        "reason": summary.reason,
        "step": summary.step,
        "total_steps": summary.total_steps,
        "samples": run.samples,
        "hours": round(history.hours, 4),
        "last": clean(summary.metrics),
        "evals": clean({k.removeprefix(histories.EVALS): v if math.isfinite(v) else None for k, v in evals.items()}),
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


def _header(history: History) -> tuple[str, Header] | None:
    """Of the first launch's recipe, where it is one of this package."""
    name = history.launches[0].get("recipe") if history.launches else None
    if not isinstance(name, str) or name not in recipe_names():
        return None
    try:
        return name, header_of(resources.files("mimscale.recipes").joinpath(f"{name}.yaml").read_text())
    except ValueError:
        return None
