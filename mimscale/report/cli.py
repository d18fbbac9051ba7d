"""mimscale report: one page, made from the folders of runs. Reads them only; needs no torch."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from mimscale.errors import UserError, printable, warn
from mimscale.files.atomic import atomic_write
from mimscale.files.command_line import end_with_example
from mimscale.files.console import plain_console
from mimscale.report import page, runs

PATIENCE_S = 3.0
"""Work that takes longer says how far it is."""
SUFFIXES = (".html", ".htm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="RUN", help="folders of runs, and last the page: OUT.html"
    )
    parser.add_argument(
        "--json", action="store_true", help="print what the page says, as JSON; OUT.html may be left out"
    )
    end_with_example(parser, "mimscale report runs/l16 l16.html")


def run(args: argparse.Namespace) -> int:
    *folders, out = args.paths
    if out.suffix.lower() not in SUFFIXES:
        if not args.json:
            raise UserError(
                f"{out} is no page; name the folders of runs, and last the page to write, such as report.html"
            )
        folders, out = args.paths, None
    if not folders:
        raise UserError("no run is named; name the folders of runs before the page")
    if out is not None:
        if (line := page.missing()) is not None:
            raise UserError(line)
        if out.is_dir() or not out.absolute().parent.is_dir():
            raise UserError(f"{out} cannot be written: it is a folder, or its folder is missing; name another page")
    start_s, found = time.monotonic(), []
    for number, (folder, name) in enumerate(zip(folders, runs.names(folders), strict=True), start=1):
        if time.monotonic() - start_s > PATIENCE_S:
            warn(f"mimscale report: reading run {number} of {len(folders)}, {name}")
        found.append(runs.read(folder, name))
    if args.json:
        print(json.dumps(as_json(found), indent=2, allow_nan=False))
    if out is not None:
        if time.monotonic() - start_s > PATIENCE_S:
            warn("mimscale report: drawing")
        write(out, page.render(found))
        if not args.json:
            size = out.stat().st_size / 1e6
            plain_console().print(printable(f"wrote {out} ({size:.1f} MB)"), soft_wrap=True)
    return 0


def as_json(found: list[runs.Run]) -> dict[str, Any]:
    """What --json prints."""
    summaries = [runs.summary(one) for one in found]
    return {"format": 1, "runs": summaries, "differences": runs.recipe_differences(found) if len(found) > 1 else {}}


def write(out: Path, text: str) -> None:
    """Whole or not at all. Raises UserError."""
    try:
        atomic_write(out, text.encode())
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}; name another page") from None
