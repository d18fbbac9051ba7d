"""What an evaluation leaves behind: a JSON file and a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from mimscale.errors import printable
from mimscale.files.atomic import atomic_write


def write(report: Mapping[str, Any], out: Path) -> None:
    """Whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, (json.dumps(report, indent=1) + "\n").encode())


def lines(report: Mapping[str, Any]) -> list[str]:
    """What stands below the table: how the figures differ from those of papers, and what they cost."""
    protocol, seconds = report["protocol"], report["seconds"]
    place = f"{protocol['device']}, {report['ranks']} rank(s), {protocol['precision']}"
    times = f"features {seconds['features']:.1f} s, {protocol['name']} {seconds['fit']:.1f} s"
    return [
        *(f"differs from papers: {line}" for line in report["departs"]),
        f"{place}: {times}; commit {(report['commit'] or 'unknown')[:12]}",
    ]


def table(report: Mapping[str, Any]) -> Table:
    """The rows of a report for the terminal: one column per metric of its protocol."""
    val = report["val"]
    out = Table(title=f"{report['unit']} on {val['samples']:,} samples of {printable(val['shards'])}")
    for heading in ("network", "pool", "step"):
        out.add_column(heading)
    for heading in report["metrics"].values():
        out.add_column(heading, justify="right")
    for row in report["rows"]:
        step = row.get("step")
        values = (_value(row, metric) for metric in report["metrics"])
        out.add_row(printable(row["network"]), row["pool"], "" if step is None else f"{step:,}", *values)
    return out


def _value(row: Mapping[str, Any], metric: str) -> str:
    if metric not in row:
        return ""
    deviation = row.get(f"{metric}_sd")
    return f"{row[metric]:.1f}" if deviation is None else f"{row[metric]:.1f} ± {deviation:.1f}"
