"""mimscale report: one page, made from the folders of runs. Reads them only; needs no torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mimscale.errors import UserError, printable
from mimscale.files.atomic import atomic_write
from mimscale.files.command_line import add_json, end_with_example, print_json
from mimscale.files.console import plain_console
from mimscale.files.progress import tracked, working
from mimscale.report import page, runs

SUFFIXES = (".html", ".htm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="RUN", help="folders of runs; the last word is the page, OUT.html"
    )
    add_json(parser, "print what the page says as JSON; OUT.html may be left out")
    end_with_example(parser, "mimscale report runs/mae_tiny report.html")


def run(args: argparse.Namespace) -> int:
    *folders, out = args.paths
    if out.suffix.lower() not in SUFFIXES:
        if not args.json:
            raise UserError(f"{out} is no page; name the folders of runs, and last the page, such as report.html")
        folders, out = args.paths, None
    if not folders:
        raise UserError("no run is named; name the folders of runs before the page")
    if out is not None:
        if (line := page.missing()) is not None:
            raise UserError(line)
        if out.is_dir() or not out.absolute().parent.is_dir():
            raise UserError(f"{out} cannot be written: it is a folder, or its folder is missing; name another page")
    named = zip(folders, runs.names(folders), strict=True)
    found = [runs.read(folder, name) for folder, name in tracked(named, len(folders), "reading runs", "runs")]
    if args.json:
        print_json(as_json(found))
    if out is not None:
        with working("drawing the page"):
            write(out, page.render(found))
        if not args.json:
            size = out.stat().st_size / 1e6
            plain_console().print(printable(f"wrote {out} ({size:.1f} MB)"), soft_wrap=True)
    return 0


def as_json(found: list[runs.Run]) -> dict[str, Any]:
    """What --json prints."""
    summaries = [runs.plain(one) for one in found]
    return {"format": 1, "runs": summaries, "differences": runs.recipe_differences(found) if len(found) > 1 else {}}


def write(out: Path, text: str) -> None:
    """Whole or not at all. Raises UserError."""
    try:
        atomic_write(out, text.encode())
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}; name another page") from None
