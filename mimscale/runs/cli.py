"""`mimscale runs DIR`, `mimscale runs compare RUN RUN`: what runs there are, how far each is, what differs."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mimscale.errors import UserError, printable, warn
from mimscale.files.command_line import add_json, end_with_example, print_json
from mimscale.files.console import plain_console
from mimscale.files.durations import duration
from mimscale.runs.compare import compare
from mimscale.runs.find import find_runs
from mimscale.runs.summary import OTHER_SCALES, Figure, Summary, age_s, summary_of

COMPARE = "compare"
WIDE = 140
"""Columns where the output is no terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    end_with_example(parser, "mimscale runs runs", "mimscale runs compare runs/mae_vit_b16 runs/mff_vit_b16")
    parser.usage = "mimscale runs [DIR] [--metric NAME] [--json]\n       mimscale runs compare RUN RUN [...] [--json]"
    parser.add_argument(
        "words", nargs="*", metavar="DIR", help="a folder with runs in it, at any depth (default: runs); or compare"
    )
    parser.add_argument(
        "--metric", metavar="NAME", help="the evaluation to show (default: the one that most runs have)"
    )
    add_json(parser, "everything that is known of each, as JSON")


def run(args: argparse.Namespace) -> int:
    words = args.words or ["runs"]
    if words[0] == COMPARE:
        return _compare([Path(word) for word in words[1:]], args)
    if len(words) > 1:
        raise UserError(f"{words[1]}: one folder at a time; `mimscale runs {COMPARE} RUN RUN` compares runs")
    return _list(Path(words[0]), args)


def _list(root: Path, args: argparse.Namespace) -> int:
    if not root.is_dir():
        raise UserError(f"{printable(str(root))} is no folder; name one with runs in it")
    unreadable: list[str] = []
    runs = [summary_of(path) for path in find_runs(root, unreadable)]
    for one in runs:
        unreadable += [f"{one.path}/{line}" for line in one.unreadable]
    if args.metric is not None and not any(_figure(one, args.metric) for one in runs):
        known = sorted({figure.name for one in runs for figure in one.figures})
        raise UserError(f"--metric {args.metric}: no run has it; choose one of {', '.join(known) or 'none'}")
    if args.json:
        print_json([one.plain() | {"age_s": age_s(one)} for one in runs])
    elif runs:
        console = _console()
        console.print(table(runs, root, console.width, args.metric or common_metric(runs)))
    else:
        warn(f"{root} holds no runs")
    for line in unreadable:
        warn(f"mimscale runs: {line}; left out")
    return 0


def _console() -> Console:
    return plain_console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE)


def common_metric(runs: Sequence[Summary]) -> str | None:
    """The evaluation that most runs have; no other scales than accuracies, of which the highest is the best."""
    names = Counter(figure.name for one in runs for figure in one.figures if figure.name not in OTHER_SCALES)
    return max(sorted(names), key=lambda name: names[name], default=None)


def table(runs: Sequence[Summary], root: Path, width: int, metric: str | None) -> Table:
    """One row per run, as many columns as fit. metric: of the column of evaluations; None: without it."""
    columns: list[tuple[str, int, bool]] = [("run", 0, False), ("status", 0, False), ("step", 0, True)]
    columns += [("loss", 0, True), (f"best {metric}", 64, True), ("age", 52, True), ("epoch", 92, True)]
    columns += [("images/s", 92, True), ("device", 110, False), ("method", 110, False), ("why", 124, False)]
    shown = [(name, right) for name, least, right in columns if width >= least and (metric or name != "best None")]
    out = Table(box=None if width < 60 else Table().box, pad_edge=width >= 60)
    rows = [[printable(cells[name]) for name, _ in shown] for cells in (_cells(one, root, metric) for one in runs)]
    for (name, right), values in zip(shown, zip(*rows, strict=True), strict=True):
        short = right or name == "status"
        widest = max(map(cell_len, (name, *values))) if short else None  # rich is slow where it measures
        out.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=short, width=widest)
    for row in rows:
        out.add_row(*map(Text, row))
    return out


def _cells(one: Summary, root: Path, metric: str | None) -> dict[str, str]:
    name = os.path.relpath(one.path, root)
    figure, age = _figure(one, metric), age_s(one)
    return {
        "run": os.path.basename(os.path.abspath(root)) if name == "." else name,
        "status": one.status,
        "step": _of(one.step, one.total_steps, ","),
        "loss": "" if one.loss is None else f"{one.loss:.4g}",
        f"best {metric}": "" if figure is None else f"{figure.value:.1f}" + _at(figure),
        "age": "" if age is None else duration(age),
        "epoch": _of(one.epoch, one.epochs, ".3g"),
        "images/s": "" if one.images_per_s is None else f"{one.images_per_s:,.4g}",
        "device": one.device or "",
        "method": one.method or "",
        "why": one.reason,
    }


def _of(part: float | None, whole: float | None, shape: str) -> str:
    if part is None:
        return ""
    return f"{part:{shape}}" if whole is None else f"{part:{shape}}/{whole:{shape}}"


def _at(figure: Figure) -> str:
    return "" if figure.step is None else f" @{figure.step:,}"


def _figure(one: Summary, metric: str | None) -> Figure | None:
    return next((figure for figure in one.figures if figure.name == metric), None)


def _compare(run_dirs: Sequence[Path], args: argparse.Namespace) -> int:
    if len(run_dirs) < 2:
        raise UserError(f"`mimscale runs {COMPARE}` needs the folders of two runs or more")
    found = compare(run_dirs)
    if args.json:
        print_json(found)
        return 0
    console = _console()
    for out in comparison_tables(found):
        console.print(out)
    for one in found["runs"]:
        for line in one["unreadable"]:
            warn(f"mimscale runs: {one['path']}/{line}; left out")
    return 0


def comparison_tables(found: Mapping[str, Any]) -> list[Table]:
    """Recipe, state with last metrics, evaluations; one column per run."""
    headings = [Text(printable(one["path"])) for one in found["runs"]]

    def opened(first: str) -> Table:
        out = Table()
        out.add_column(first, overflow="fold")
        for heading in headings:
            out.add_column(heading, overflow="fold")
        return out

    recipe = opened("recipe" if found["recipe"] else "recipe (the same)")
    for key, values in found["recipe"].items():
        recipe.add_row(Text(printable(key)), *(Text(printable(str(value))) for value in values))
    state = opened("last metrics")
    for key in ("status", "step"):
        state.add_row(key, *("" if one[key] is None else str(one[key]) for one in found["runs"]))
    for name, values in {**found["metrics"], **{f"best {k}": v for k, v in found["evaluations"].items()}}.items():
        state.add_row(Text(printable(name)), *("" if value is None else f"{value:.4g}" for value in values))
    return [recipe, state]
