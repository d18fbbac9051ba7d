"""mimscale evaluate: accuracy of frozen features, as one process or as the ranks of torchrun or srun."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

from mimscale.config.registry import names_in
from mimscale.evals import top1_cli
from mimscale.evals.launch import add_shared, check_out, default_outs, on_ranks, publish, with_ranks
from mimscale.evals.options import add_options, config_of, default_suffix
from mimscale.evals.report import lines, table
from mimscale.evals.runner import evaluate, protocol_class, protocol_names
from mimscale.files.command_line import end_with_example

TASKS = "mimscale.evals.tasks"
EXAMPLE = "mimscale evaluate {} runs/l16 --train shards/train --val shards/val"


def add_arguments(parser: argparse.ArgumentParser) -> Any:
    """The parsers of the protocols, to which others may be added."""
    end_with_example(parser, "mimscale evaluate sweep --help", f"{EXAMPLE.format('knn')} --k 10")
    protocols = parser.add_subparsers(dest="protocol", required=True, metavar="PROTOCOL", title="protocols")
    for name in protocol_names():
        kind = protocol_class(name)
        text = (kind.__doc__ or name).splitlines()[0]
        own = protocols.add_parser(name, help=text.replace("%", "%%"), description=text)
        own.add_argument("--train", type=Path, required=True, metavar="SHARDS", help="labelled data set to learn from")
        own.add_argument("--val", type=Path, required=True, metavar="SHARDS", help="labelled data set to be tested on")
        add_shared(own, pooled="pooled" in kind.needs)
        add_options(own, kind.Config)
        end_with_example(own, EXAMPLE.format(name))
    top1_cli.add_parser(protocols)
    for name in names_in(TASKS):
        task = _task(name)
        task.add_arguments(protocols.add_parser(name, help=task.SUMMARY, description=task.SUMMARY))
    return protocols


def run(args: argparse.Namespace) -> int:
    if args.protocol in names_in(TASKS):
        return int(_task(args.protocol).run(args))
    check_out(args)
    if args.protocol == top1_cli.NAME:
        return with_ranks(args, lambda device, ranks: top1_cli.run(args, device, ranks))
    config = config_of(vars(args), protocol_class(args.protocol).Config)
    report = on_ranks(
        args,
        lambda settings, ranks: evaluate(args.protocol, config, args.runs, args.train, args.val, settings, ranks),
    )
    if report is not None:
        words = [args.protocol + default_suffix(config)]
        sets = [report["train"]["fingerprint"], report["val"]["fingerprint"]]
        outs = default_outs(args, words, report["protocol"]["precision"], sets)
        publish(report, [table(report)], outs, args.json, lines(report))
    return 0


def _task(name: str) -> Any:
    return import_module(f"{TASKS}.{name}")
