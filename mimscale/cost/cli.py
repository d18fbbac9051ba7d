"""`mimscale plan RECIPE --gpus N --gpu NAME`: what a run needs, takes and costs, before anything is submitted.

Predictions; nothing runs, and no GPU is needed. The inputs are the tables of `mimscale.cost.devices`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mimscale.config.recipes import load_recipe
from mimscale.cost import measured, report, tables
from mimscale.cost.devices import device, interconnect
from mimscale.cost.planner import Planner
from mimscale.cost.run_cost import samples_of
from mimscale.errors import UserError
from mimscale.files.console import plain_console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="a recipe (`mimscale recipes` lists them) or a path to a YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="changes to the recipe")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs in all, one rank each (default: 8)")
    parser.add_argument("--gpu", default="a100", metavar="NAME", help="h100, h200, a100 (80 GB), a100-40, v100, cpu")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--interconnect", metavar="NAME", help="network of a node, such as ib8x400 or eth1x100")
    parser.add_argument(
        "--samples", type=int, metavar="N", help="images in the data set, where it is not on this machine"
    )
    parser.add_argument(
        "--measured", type=Path, metavar="FILE", help="JSON of `mimscale bench`; replaces rows of the table"
    )
    parser.add_argument("--json", action="store_true", help="everything, as JSON: seconds, bytes, FLOPs")
    parser.add_argument("--inputs", action="store_true", help="print the table of inputs with its sources, in Markdown")
    parser.add_argument("--fit", action="store_true", help="compare the model with measured steps, in Markdown")
    parser.add_argument("--all", action="store_true", help="a row for each published recipe, in Markdown")


def run(args: argparse.Namespace) -> int:
    """Returns 0. Raises UserError for bad input and for a recipe that cannot run on this cluster."""
    if args.gpus < 1 or args.gpus_per_node < 1:
        raise UserError(f"--gpus {args.gpus} --gpus-per-node {args.gpus_per_node}: both must be at least 1")
    if args.samples is not None and args.samples < 1:
        raise UserError(f"--samples {args.samples}: must be at least 1")
    gpu = device(args.gpu, args.measured)
    link = interconnect(args.interconnect, gpu)
    if args.inputs:
        print(tables.inputs())
        return 0
    if args.fit:
        print(tables.fit([measured.compare(row) for row in measured.ROWS]))
        return 0
    if args.all:
        print(tables.all_recipes(gpu, link, args.gpus, args.gpus_per_node))
        return 0
    if args.recipe is None:
        raise UserError("plan needs a recipe, or one of --all, --fit and --inputs; `mimscale recipes` lists recipes")
    if args.gpus > args.gpus_per_node and args.gpus % args.gpus_per_node:
        raise UserError(f"--gpus {args.gpus} is not a multiple of --gpus-per-node {args.gpus_per_node}")
    config = load_recipe(args.recipe, args.overrides)
    planner = Planner(config, gpu, link, args.gpus, args.gpus_per_node)
    samples, assumed = samples_of(config) if args.samples is None else (args.samples, False)
    plan = report.make_plan(planner, samples, assumed)
    name = str(args.recipe)
    if args.json:
        print(json.dumps(report.plan_json(plan, name), indent=2))
    else:
        show(plan, name)
    return 0


def show(plan: report.Plan, name: str) -> None:
    planner = plan.planner
    nodes = "1 node" if planner.nodes == 1 else f"{planner.nodes} nodes, {planner.link.name}"
    where = f"{planner.ranks} x {planner.gpu.name} on {nodes}"
    console = plain_console(width=None if sys.stdout.isatty() else 160)
    two(console, f"{name}: FLOPs per image", report.flops_rows(planner))
    table = Table(show_header=False)
    for row in report.memory_rows(planner, plan.chosen.choice):
        table.add_row(*row)
    console.print(Text(f"memory per GPU, {planner.ranks} ranks, micro-batch {plan.chosen.choice.micro_batch}"), table)
    if plan.best is None or plan.asked.choice != plan.best.choice:
        two(console, f"as the recipe says, on {where}", report.prediction_rows(planner, plan.asked))
    if plan.best is not None:
        two(console, f"best, on {where}", report.prediction_rows(planner, plan.best))
        console.print(Text(f"why: {planner.why(plan.best)}"))
    two(console, "the run (predicted, not measured)", report.cost_rows(plan))
    for note in report.notes(plan):
        console.print(Text(f"note: {note}"))
    if plan.best is not None:
        print("submit it, or give the overrides to `mimscale train`:")
        print(report.command(plan, name))


def two(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    """A title and a table of two columns."""
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for what, value in rows:
        table.add_row(what, Text(value))
    console.print(Text(title), table)
