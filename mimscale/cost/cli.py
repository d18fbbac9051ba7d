"""`mimscale plan RECIPE --gpus N --gpu NAME`: what a run needs, takes and costs, before anything is submitted.

Predictions; nothing runs, and no GPU is needed. The inputs are the tables of `mimscale.cost.devices`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mimscale.config.recipes import load_recipe
from mimscale.cost import measured, report, simulate, tables
from mimscale.cost.devices import INTERCONNECTS, device, interconnect
from mimscale.cost.planner import Planner
from mimscale.cost.run_cost import samples_of
from mimscale.errors import UserError
from mimscale.files.command_line import add_json, end_with_example, print_json, tables_json
from mimscale.files.console import plain_console
from mimscale.files.measurement import origin
from mimscale.files.progress import tracked, working

DIGITS = 15
"""Of a number on the command line; a float holds it exactly."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="name (`mimscale recipes` lists them) or YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="changes to the recipe")
    add_json(parser, "everything, as JSON: seconds, bytes, FLOPs")
    cluster = parser.add_argument_group("the cluster")
    cluster.add_argument("--gpus", default="8", metavar="N", help="GPUs in all, one rank each (default: 8)")
    cluster.add_argument("--gpu", default="a100", metavar="NAME", help="h100, h200, a100 (80 GB), a100-40, v100, cpu")
    cluster.add_argument("--gpus-per-node", default="8", metavar="N", help="default: 8")
    cluster.add_argument("--interconnect", metavar="NAME", help=f"network of a node: {', '.join(INTERCONNECTS)}")
    cluster.add_argument("--samples", metavar="N", help="images in the data set, where it is not on this machine")
    file = "of `mimscale bench train --out`; replaces rows of the table"
    cluster.add_argument("--measured", type=Path, metavar="FILE.json", help=file)
    other = parser.add_argument_group("other tables, in Markdown")
    ranks = "every rank of each of these numbers of GPUs, in place of --gpus"
    other.add_argument("--simulate", metavar="N,N,...", help=ranks)
    other.add_argument("--plot", type=Path, metavar="FILE", help="with --simulate: scaling curves, as .png or .svg")
    other.add_argument("--inputs", action="store_true", help="the inputs with their sources")
    other.add_argument("--fit", action="store_true", help="the model beside measured steps")
    other.add_argument("--all", action="store_true", help="all published recipes on 8 x a100 and 64 x h100")
    end_with_example(
        parser,
        "mimscale plan mae_vit_l16 --gpus 64 --gpu h100",
        "mimscale plan maskalign_vit_h14 --simulate 8,64,512 --gpu h100",
    )


def whole(option: str, text: str) -> int:
    """A number of GPUs or images on the command line. Raises UserError."""
    if not (text.isascii() and text.isdecimal() and len(text) <= DIGITS) or int(text) < 1:
        raise UserError(f"{option} {text[:40]} must be a whole number of at least 1, in at most {DIGITS} digits")
    return int(text)


def check_nodes(option: str, gpus: int, per_node: int) -> None:
    """Raises UserError where GPUs on several nodes do not fill them."""
    if gpus > per_node and gpus % per_node:
        raise UserError(
            f"{option} {gpus} is not a multiple of --gpus-per-node {per_node}; use whole nodes, or change the latter"
        )


def run(args: argparse.Namespace) -> int:
    """Returns 0. Raises UserError for bad input and for a recipe that cannot run on this cluster."""
    gpu = device(args.gpu, args.measured)
    link = interconnect(args.interconnect, gpu)
    if args.inputs:
        return titled(tables.inputs(), as_json=args.json)
    if args.fit:
        rows = tracked(measured.ROWS, len(measured.ROWS), "comparing", "rows")
        return titled(*tables.fit([measured.compare(row) for row in rows]), as_json=args.json)
    if args.all:
        return titled(tables.all_recipes(), as_json=args.json)
    if args.recipe is None:
        raise UserError("plan needs a recipe, or one of --all, --fit and --inputs; `mimscale recipes` lists recipes")
    for option in ("gpus", "gpus_per_node", "samples"):
        if (given := getattr(args, option)) is not None:
            setattr(args, option, whole(f"--{option.replace('_', '-')}", given))
    counts = None if args.simulate is None else sorted({whole("--simulate", w) for w in args.simulate.split(",")})
    for gpus in counts or [args.gpus]:
        check_nodes("--gpus" if counts is None else "--simulate", gpus, args.gpus_per_node)
    config, precision = report.for_gpu(load_recipe(args.recipe, args.overrides), gpu)
    planner = Planner(config, gpu, link, args.gpus, args.gpus_per_node)
    samples, assumed = samples_of(config) if args.samples is None else (args.samples, False)
    if counts is not None:
        return simulated(planner, args, counts, samples)
    if args.plot is not None:
        raise UserError(f"--plot {args.plot} draws what --simulate computes; add --simulate 8,64,256")
    with working("planning"):
        plan = report.make_plan(planner, samples, assumed, precision, args.overrides)
    name = str(args.recipe)
    if args.json:
        print_json(report.plan_json(plan, name))
    else:
        show(plan, name)
    return 0


def titled(found: list[tables.Titled], remarks: Sequence[str] = (), *, as_json: bool) -> int:
    """Print tables, remarks and where they come from. Returns 0."""
    if as_json:
        print_json({"tables": tables_json(found), "notes": remarks, "origin": origin()})
    else:
        texts = [part for title, heads, rows in found for part in (title, report.markdown(heads, rows)) if part]
        print("\n\n".join([*texts, *remarks, origin()]))
    return 0


def simulated(planner: Planner, args: argparse.Namespace, counts: Sequence[int], samples: int) -> int:
    """Strong and weak scaling over rising numbers of GPUs: tables, JSON, a plot. Returns 0."""
    if args.plot is not None and args.plot.suffix not in (".png", ".svg"):
        raise UserError(f"--plot {args.plot}: the name must end in .png or .svg")
    with working("simulating"):
        strong = simulate.simulate(planner, counts, samples)
        weak = simulate.simulate(planner, counts, samples, weak=True)
    if args.json:
        print_json({"strong": report.as_json(strong), "weak": report.as_json(weak)})
    else:
        batch = planner.config.schedule.global_batch
        print(f"{args.recipe} on {planner.gpu.name}, {planner.link.name}, global batch {batch} (predicted):\n")
        print(report.markdown(*simulate.table(strong)))
        print(f"\nThe same with {batch // counts[0]} images per GPU on each number:\n")
        print(report.markdown(*simulate.table(weak)))
    if args.plot is not None:
        simulate.plot(strong, weak, f"{args.recipe}, {planner.gpu.name}, {planner.link.name}", args.plot)
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
    for note in report.notes(plan, name):
        console.print(Text(f"note: {note}"))
    if plan.best is not None:
        if planner.gpu.name == "cpu":
            print("overrides for `mimscale train`:", *report.overrides(plan), sep="\n")
        else:
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
