"""What an evaluation leaves behind: a JSON file and a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from mimscale.files.atomic import atomic_write


def write(report: Mapping[str, Any], out: Path) -> None:
    """Whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, (json.dumps(report, indent=1) + "\n").encode())


def table(report: Mapping[str, Any]) -> Table:
    """The rows of a report for the terminal."""
    protocol = report["protocol"]
    columns: dict[str, Callable[[Mapping[str, Any]], str]]
    if protocol["name"] == "knn":
        columns = {f"kNN (k = {protocol['k']})": lambda row: f"{row['knn']:.1f}"}
    else:
        columns = {"linear, all labels": lambda row: f"{row['linear']:.1f}"}
        if protocol["shots"]:
            heading = f"{protocol['shots']} labels per class"
            columns[heading] = lambda row: f"{row['few_shot']:.1f} ± {row['few_shot_sd']:.1f}"
    out = Table(title=f"top-1 in percent on {report['val']['samples']:,} samples of {report['val']['shards']}")
    for heading in ("network", "pool", "step"):
        out.add_column(heading)
    for heading in columns:
        out.add_column(heading, justify="right")
    for row in report["rows"]:
        step = row.get("step")
        out.add_row(
            row["network"], row["pool"], "" if step is None else f"{step:,}", *(f(row) for f in columns.values())
        )
    return out
