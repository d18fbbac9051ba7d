"""What benchmarks print besides their own figures, and how: Markdown, or with --json one JSON document."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mimscale.files.command_line import print_json, tables_json
from mimscale.files.measurement import commit as commit
from mimscale.files.measurement import origin as origin
from mimscale.files.measurement import processor as processor
from mimscale.files.measurement import table as table

Table = tuple[list[str], list[list[str]]]  # columns, rows of cells


def publish(args: argparse.Namespace, tables: Sequence[Table], notes: Sequence[str] = (), more: str = "") -> None:
    """Print the tables of a benchmark, the lines below them, and where they come from. more: goes on in that line."""
    where = origin() + more
    if args.json:
        print_json(
            {"bench": args.bench, "tables": tables_json(("", *one) for one in tables), "notes": notes}
            | {"origin": where}
        )
        return
    print("\n\n".join([*(table(*one) for one in tables), *notes, where]))
