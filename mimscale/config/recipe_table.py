"""`mimscale recipes`: the recipes of this package, what each should reach and cost. Needs no torch.

The header of a recipe, the comment above its first key, is a title and then paragraphs `# Name: text`, whose further
lines are indented; "Source", "Expected result" and "Expected cost" are in all of them.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from mimscale.config.recipes import read_recipe, recipe_names
from mimscale.errors import UserError
from mimscale.files.command_line import add_json, end_with_example, print_json
from mimscale.files.console import plain_console

WIDE = 140
"""Columns of a terminal that holds the expected results too."""
LEGEND = (
    "student: ViT-size/patch, or width x depth/patch. `mimscale train RECIPE --show` prints a recipe whole; --json "
    "adds where each comes from, how its cost was found, and what it extends. Costs: FLOPs as `mimscale plan` counts "
    "them, at 40 % of an A100's peak; `mimscale plan RECIPE` predicts a run on a cluster."
)


class Header(NamedTuple):
    """What the comment above a recipe says, each paragraph on one line. notes: name -> text of the other ones."""

    title: str
    source: str
    result: str
    cost: str
    notes: dict[str, str]

    @property
    def a100_hours(self) -> int | None:
        """The GPU-hours of the cost; None where it has none."""
        found = re.search(r"about ([\d,]+) A100-hours", self.cost)
        return int(found[1].replace(",", "")) if found else None


def header_of(text: str) -> Header:
    """The header of a recipe's text. Raises ValueError where a paragraph that all have is missing."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#"))
    title, _, rest = "\n".join(lines).partition("\n\n")
    found = re.findall(r"^ ([A-Z][^:\n]*(?:\n   [^:\n]+)*): (.+(?:\n   .+)*)", rest, re.MULTILINE)
    paragraphs = {_one_line(name): _one_line(words) for name, words in found}
    try:
        source, result, cost = (paragraphs.pop(name) for name in ("Source", "Expected result", "Expected cost"))
    except KeyError as error:
        raise ValueError(f"the header has no paragraph {error}") from None
    return Header(_one_line(title), source, result, cost, paragraphs)


def row(recipe: str) -> dict[str, Any]:
    """Plain values of one recipe of this package, for JSON; null where a recipe says nothing."""
    values, base = read_recipe(recipe)
    header = header_of(resources.files("mimscale.recipes").joinpath(f"{recipe}.yaml").read_text())
    method, schedule = values["method"], values["schedule"]
    return {
        "recipe": recipe,
        "title": header.title,
        "method": method["name"],
        "masking": (method.get("masking") or {}).get("policy"),
        "student": student_name(values["student"], "stages" in method),
        "teachers": {name: teacher["model"] for name, teacher in (values.get("teachers") or {}).items()},
        "epochs": schedule.get("epochs"),
        "steps": schedule.get("steps"),
        "global_batch": schedule["global_batch"],
        "source": header.source,
        "expected_result": header.result,
        "expected_cost": header.cost,
        "a100_hours": header.a100_hours,
        "notes": header.notes,
        "extends": base,
    }


def student_name(student: Mapping[str, Any], stages: bool) -> str:
    """ViT-B/16, or for a shape without a name width x depth / patch; with stages: after convolutions."""
    size = student.get("size")
    name = f"ViT-{size[0].upper()}" if size else f"{student['width']}x{student['depth']}"
    return f"{'conv + ' if stages else ''}{name}/{student.get('patch', 16)}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="only recipes whose names contain one of these")
    add_json(parser, "everything that is known of each, as JSON")
    end_with_example(parser, "mimscale recipes mae maskalign", "mimscale recipes --json")


def run(args: argparse.Namespace) -> int:
    chosen = [name for name in recipe_names() if not args.names or any(part in name for part in args.names)]
    if not chosen:
        raise UserError(f"no recipe's name contains {' or '.join(args.names)}; `mimscale recipes` lists all")
    rows = [row(recipe) for recipe in chosen]
    if args.json:
        print_json(rows)
        return 0
    console = plain_console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE)
    wide = console.width >= WIDE
    table = Table()
    table.add_column("recipe", no_wrap=True)
    table.add_column("method", no_wrap=wide)
    table.add_column("student", no_wrap=True)
    table.add_column("epochs", justify="right", no_wrap=True)
    if wide:
        table.add_column("expected cost", max_width=24)
        table.add_column("expected result")
    else:
        table.add_column("A100-hours", justify="right", no_wrap=True)
    for one in rows:
        method = one["method"] if one["masking"] in (None, "random") else f"{one['method']}, {one['masking']}"
        epochs = f"{one['steps']} steps" if one["epochs"] is None else f"{one['epochs']:g}"
        words, hours = [one["recipe"], method, one["student"], epochs], one["a100_hours"]
        if wide:
            cost = _first_sentence(one["expected_cost"]) if hours is None else f"{hours:,} A100-hours"
            words += [cost, _first_sentence(one["expected_result"])]
        else:
            words.append("" if hours is None else f"{hours:,}")
        table.add_row(*map(Text, words))
    console.print(table, Text(LEGEND))
    if not wide:
        console.print(f"The expected results fit a terminal of {WIDE} columns; --json prints them too.")
    return 0


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _first_sentence(text: str) -> str:
    return re.split(r"\.(?:\s|$)", text, maxsplit=1)[0]
