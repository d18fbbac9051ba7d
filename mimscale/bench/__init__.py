"""`mimscale bench NAME`: measurements whose printed tables are in the documentation.

A benchmark is a file in this folder, found by its name, with `add_arguments(parser)` and `run(args) -> exit code`. The
first line of its docstring is its help, and its `EXAMPLE` ends it, if it cannot be called without arguments. Heavy
imports belong into `run`. A new benchmark needs no change here.
"""

from __future__ import annotations

import argparse
import importlib
import math
from importlib import resources

from mimscale.errors import UserError
from mimscale.files.command_line import add_json, end_with_example
from mimscale.files.progress import working

SAY_MORE = ("methods", "train")
"""Benchmarks that print a line for each of their parts."""
MAY_BE_ZERO = ("warm_up", "workers")


def names() -> list[str]:
    files = (entry.name for entry in resources.files(__name__).iterdir())
    return sorted(f[:-3] for f in files if f.endswith(".py") and not f.startswith("_"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(dest="bench", required=True, metavar="NAME")
    for name in names():
        module = importlib.import_module(f"{__name__}.{name}")
        text = (module.__doc__ or "").splitlines()[0]
        sub = benches.add_parser(name, help=text, description=text)
        module.add_arguments(sub)
        add_json(sub)
        end_with_example(sub, getattr(module, "EXAMPLE", f"mimscale bench {name}"))
        sub.set_defaults(start=module.run)
    end_with_example(parser, "mimscale bench train --help", "mimscale bench data --images 128 --rounds 3")


def check_numbers(args: argparse.Namespace) -> None:
    """Every number that a benchmark takes counts or measures something. Raises UserError where it cannot."""
    for name, value in vars(args).items():
        least = 0 if name in MAY_BE_ZERO else 1
        for one in value if isinstance(value, list | tuple) else [value]:
            whole = isinstance(one, int) and not isinstance(one, bool)
            option = f"--{name.replace('_', '-')} {one}"
            if whole and one < least:
                raise UserError(f"{option} must be at least {least}")
            if isinstance(one, float) and not 0 < one < math.inf:
                raise UserError(f"{option} must be a number above 0")


def run(args: argparse.Namespace) -> int:
    check_numbers(args)
    if args.bench in SAY_MORE:
        return int(args.start(args))
    with working(f"bench {args.bench}", moving=False):
        return int(args.start(args))
