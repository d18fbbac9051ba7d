"""Which methods there are, from where, and how near they are to the official code:  python -m tests.methods_table

Runs the tests that compare with official numbers ($MIMSCALE_GOLDENS: the whole set), writes what they measured to
tests/measured.json, and from that, the methods' docstrings and the recipes the table in README.md and docs/methods.md.
With --render the tests do not run. A test fails where the two files are not what this program would write.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import yaml

from mimscale.config.recipes import recipe_names
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
}
WHERE = ("test_*.py", *(f"{room}/test_*.py" for room in ("data", "engine", "masking", "methods", "models", "teachers")))
PARTS = {"sincos": "maskalign", "clip14": "maskalign", "attentive": "maskalign", "schedules": "finetune"}
POLICIES = ("amt",)
Measured = dict[str, dict[str, dict[str, list[float]]]]  # method -> golden -> kind -> [largest error, tolerance]


@dataclass(frozen=True)
class Facts:
    """What a method's docstring says: "Title: what it is (source)." and a paragraph "Differences ...: text"."""

    title: str
    what: str
    source: str
    differences: str


def facts(name: str) -> Facts:
    package = "methods" if name in method_names() else "masking"
    first, *paragraphs = (import_module(f"mimscale.{package}.{name}").__doc__ or "").split("\n\n")
    head = re.fullmatch(r"([^:]+): (.+) \((.+)\)\.", " ".join(first.split()), re.DOTALL)
    assert head, f"{name}: the docstring's first paragraph is not 'Title: what it is (source).'"
    told = [" ".join(p.split()) for p in paragraphs if p.lstrip().startswith("Differences")]
    assert len(told) == 1, f"{name}: the docstring needs one paragraph 'Differences ...: text'"
    return Facts(head[1], head[2], head[3], told[0].partition(": ")[2])


def rows() -> list[str]:
    """Methods, and the masking policies that were published on their own."""
    return [*method_names(), *POLICIES]


def recipes_of(name: str) -> list[str]:
    """Recipes of a method or policy, without the tiny ones and the demo's."""
    found = []
    for recipe in recipe_names():
        section = yaml.safe_load(resources.files("mimscale.recipes").joinpath(f"{recipe}.yaml").read_text())["method"]
        policy = section.get("masking", {}).get("policy")
        if name == (policy if policy in POLICIES else section["name"]):
            found.append(recipe)
    return [recipe for recipe in found if not recipe.startswith("demo_") and not recipe.endswith("_tiny")]


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
    part = PARTS.get(golden.partition("_")[0])
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


def table(measured: Measured) -> Iterator[str]:
    heads = (
        "method",
        "source",
        "recipes",
        "largest error against the official code (tolerance)",
        "cases",
        "what differs",
    )
    yield f"| {' | '.join(heads)} |"
    yield f"|{' --- |' * len(heads)}"
    for name in rows():
        told = facts(name)
        recipes = ", ".join(f"`{recipe}`" for recipe in recipes_of(name)) or "none"
        public = "code not public; the part that others published: " if told.differences.startswith("unknown") else ""
        cases = measured.get(name, {})
        near, goldens = f"{public}{errors(cases)}", ", ".join(f"`{golden}`" for golden in cases)
        yield f"| {told.title} | {told.source} | {recipes} | {near} | {goldens} | {told.differences} |"


UNITS = (
    "Activations: absolute. Loss and learning rates: relative. Gradients: relative to the tensor's "
    "largest entry. Without a tolerance: equal to the bit. Networks of a few blocks, random weights and images, fp32 "
    "on a CPU."
)


def page(measured: Measured) -> Iterator[str]:
    yield from ("# Methods", "", "Written by `python -m tests.methods_table` from test results; do not edit.", "")
    yield from (UNITS, "")
    for name in rows():
        told, cases = facts(name), measured.get(name, {})
        yield from (f"## {told.title}", "", f"{told.what[0].upper()}{told.what[1:]} ({told.source}).", "")
        yield from (f"Differences: {told.differences}", "")
        for golden, kinds in cases.items():
            yield f"- `{golden}`: {errors({golden: kinds})}"
        if cases:
            yield ""


def written(measured: Measured) -> dict[Path, str]:
    """What the two files should hold."""
    readme = README.read_text()
    start, end = (readme.index(mark) for mark in MARKS)
    block = "\n".join((MARKS[0], "", *table(measured), "", UNITS, ""))
    page_text = "\n".join(page(measured)).rstrip() + "\n"
    return {README: readme[:start] + block + "\n" + readme[end:], DOCS: page_text}


def main() -> None:
    if "--render" not in sys.argv:
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(cases)}" for name, cases in measure().items())
        MEASURED.write_text(f"{{\n{lines}\n}}\n")
    for path, text in written(json.loads(MEASURED.read_text())).items():
        path.write_text(text)


if __name__ == "__main__":
    main()
