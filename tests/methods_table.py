"""Which methods there are, their papers, and their errors against the official code:  python -m tests.methods_table

Runs the tests that compare with official numbers ($MIMSCALE_GOLDENS: the whole set) and writes their errors to
tests/measured.json. From that file, the methods' docstrings and the recipes it writes the short table in README.md and
the long one in docs/methods.md. With --render the tests do not run. A test fails where the two files are not what this
program would write.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from mimscale.config.recipes import read_recipe, recipe_names
from mimscale.config.run import method_names

ROOT = Path(__file__).parent.parent
MEASURED = Path(__file__).parent / "measured.json"
README, DOCS = ROOT / "README.md", ROOT / "docs" / "methods.md"
MARKS = ("<!-- methods: python -m tests.methods_table -->", "<!-- end of methods -->")
KINDS = {
    "activation": "activations",
    "loss": "loss",
    "gradient": "gradients",
    "mask": "masks",
    "pixel": "cropped pixels",
    "table": "position tables",
    "rate": "learning rates",
    "move": "trained weights",
}
WHERE = (
    "test_*.py",
    *(f"{folder}/test_*.py" for folder in ("data", "engine", "masking", "methods", "models", "optim", "teachers")),
)
PARTS = {
    "sincos": "maskalign",
    "clip14": "maskalign",
    "attentive": "maskalign",
    "schedules": "finetune",
    "mae_finetune": "finetune",
    "mae_linprobe": "linear_probe",
    "lars": "linear_probe",
}
POLICIES = ("amt",)
Measured = dict[str, dict[str, dict[str, list[float]]]]  # method -> golden -> kind -> [largest error, tolerance]


@dataclass(frozen=True)
class Facts:
    """From a method's docstring: "Title: what it is (source)." and a paragraph "Differences ...: text"."""

    title: str
    what: str
    source: str
    differences: str


def facts(name: str) -> Facts:
    """A docstring of another form still gives a row, so that a new method can begin without these paragraphs."""
    package = "methods" if name in method_names() else "masking"
    first, *paragraphs = (import_module(f"mimscale.{package}.{name}").__doc__ or name).split("\n\n")
    head = re.fullmatch(r"([^:]+): (.+) \((.+)\)\.", " ".join(first.split()), re.DOTALL)
    title, what, source = head.groups() if head else (name, " ".join(first.split()).rstrip("."), "none given")
    texts = [" ".join(p.split()) for p in paragraphs if p.lstrip().startswith("Differences")]
    return Facts(title, what, source, texts[0].partition(": ")[2] if texts else "none given")


def rows() -> list[str]:
    """Methods, and the masking policies that were published on their own."""
    return [*method_names(), *POLICIES]


@cache
def recipes_by_row() -> dict[str, list[str]]:
    """Method or policy -> its recipes, without the tiny ones and the demo's."""
    found: dict[str, list[str]] = {}
    for recipe in recipe_names():
        if not (recipe.startswith("demo_") or recipe.endswith("_tiny")):
            section = read_recipe(recipe)[0]["method"]
            policy = section.get("masking", {}).get("policy")
            found.setdefault(policy if policy in POLICIES else section["name"], []).append(recipe)
    return found


def recipes_of(name: str) -> list[str]:
    return recipes_by_row().get(name, [])


def one_per_student(recipes: list[str]) -> list[str]:
    """The recipes without those whose name continues the name of another: other lengths and batches of it."""
    return [name for name in recipes if not any(name.startswith(f"{other}_") for other in recipes)]


# ------------------------------------------------------------------------------------------------ measuring


def measure() -> Measured:
    """Run the comparisons; fails where one fails or is skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        environment = {**os.environ, "MIMSCALE_GOLDEN_REPORT": str(report), "MIMSCALE_NO_SKIPS": "1"}
        where = [str(path) for place in WHERE for path in sorted((ROOT / "tests").glob(place)) if _compares(path)]
        words = [sys.executable, "-m", "pytest", "-m", "not multi and not slow", *where]
        subprocess.run(words, cwd=ROOT, env=environment, check=True)
        return merged([json.loads(line) for line in report.read_text().splitlines()])


def _compares(path: Path) -> bool:
    return "golden.load" in path.read_text() or path.parent.name == "engine"


def merged(lines: list[dict[str, Any]]) -> Measured:
    """The largest error and tolerance of each kind, per method and golden."""
    measured: Measured = {}
    for line in lines:
        name = method_of(line["test"], line["golden"])
        if name is not None:
            kinds = measured.setdefault(name, {}).setdefault(line["golden"], {})
            error, tolerance = kinds.get(line["kind"], [0.0, 0.0])
            error = float(f"{max(line['error'], error):.1e}")
            kinds[line["kind"]] = [error, max(line["tolerance"], tolerance)]
    return {name: dict(sorted(measured[name].items())) for name in sorted(measured)}


def method_of(test: str, golden: str) -> str | None:
    """Whose comparison it is: that of the test's file where it is a method's, else that of the golden."""
    name = Path(test.partition("::")[0]).stem.removeprefix("test_")
    if name in rows():
        return name
    part = next((method for start, method in PARTS.items() if golden.startswith(f"{start}_")), None)
    return part or max((name for name in rows() if golden.startswith(name)), key=len, default=None)


# ------------------------------------------------------------------------------------------------ writing


def errors(cases: dict[str, dict[str, list[float]]]) -> str:
    """The largest error of each kind over some goldens, with its tolerance."""
    told = []
    for kind, word in KINDS.items():
        found = [case[kind] for case in cases.values() if kind in case]
        if found:
            error, tolerance = (max(values) for values in zip(*found, strict=True))
            told.append(f"{word} {f'{error:.0e}' if error else 'equal'}{f' ({tolerance:.0e})' if tolerance else ''}")
    return ", ".join(told) or "none"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def quoted(recipes: list[str]) -> str:
    return ", ".join(f"`{recipe}`" for recipe in recipes) or "none"


def from_paper(told: Facts) -> bool:
    """Whether there is no official code to compare with, so that the method follows the paper alone."""
    return told.differences.startswith("unknown")


def short_table(measured: Measured, names: Sequence[str] = ()) -> Iterator[str]:
    """The README's: one line per method."""
    yield row("method", "paper", "recipes, one per student", "numbers equal to the official code")
    yield row(*["---"] * 4)
    for name in names or rows():
        told = facts(name)
        equal = "yes" if name in measured else "not compared"
        if from_paper(told):
            equal = "code not public; follows the paper"
        yield row(told.title, told.source, quoted(one_per_student(recipes_of(name))), equal)


def long_table(measured: Measured, names: Sequence[str] = ()) -> Iterator[str]:
    """docs/methods.md's: every recipe and the errors."""
    yield row("method", "paper", "recipes", "largest error against the official code (tolerance)")
    yield row(*["---"] * 4)
    for name in names or rows():
        told = facts(name)
        part = "code not public; the part that others published: " if from_paper(told) else ""
        yield row(told.title, told.source, quoted(recipes_of(name)), part + errors(measured.get(name, {})))


UNITS = (
    "Activations: absolute. Loss and learning rates: relative. Gradients: relative to the tensor's "
    "largest entry. Trained weights: after the steps of an official run, at ZeRO 0 to 3, relative to the norm of the "
    "tensor's move. Without a tolerance: equal to the bit. Networks of a few blocks, random weights and images, fp32 "
    "on a CPU."
)


def page(measured: Measured, names: Sequence[str] = ()) -> Iterator[str]:
    yield from ("# Methods", "", "Written by `python -m tests.methods_table` from test results; do not edit.", "")
    yield from (*long_table(measured, names), "", UNITS, "")
    for name in names or rows():
        told, cases = facts(name), measured.get(name, {})
        yield from (f"## {told.title}", "", f"{told.what[0].upper()}{told.what[1:]} ({told.source}).", "")
        yield from (f"Differences: {told.differences}", "")
        for golden, kinds in cases.items():
            yield f"- `{golden}`: {errors({golden: kinds})}"
        if cases:
            yield ""


def written(measured: Measured, names: Sequence[str] = ()) -> dict[Path, str]:
    """What the two files should hold. names: of the methods and policies; without them all that there are."""
    readme = README.read_text()
    start, end = (readme.index(mark) for mark in MARKS)
    block = "\n".join((MARKS[0], "", *short_table(measured, names), ""))
    page_text = "\n".join(page(measured, names)).rstrip() + "\n"
    return {README: readme[:start] + block + "\n" + readme[end:], DOCS: page_text}


def main() -> None:
    if "--render" not in sys.argv:
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(cases)}" for name, cases in measure().items())
        MEASURED.write_text(f"{{\n{lines}\n}}\n")
    for path, text in written(json.loads(MEASURED.read_text())).items():
        path.write_text(text)


if __name__ == "__main__":
    main()
