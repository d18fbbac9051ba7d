"""The verb `evaluate`: the protocols of `mimscale.evals`, and the one that trains a run of its own."""

from __future__ import annotations

import argparse

from mimscale.api import linear_mae
from mimscale.evals import cli


def add_arguments(parser: argparse.ArgumentParser) -> None:
    linear_mae.add_parser(cli.add_arguments(parser))


def run(args: argparse.Namespace) -> int:
    return linear_mae.run(args) if args.protocol == linear_mae.NAME else cli.run(args)
