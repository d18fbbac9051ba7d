"""`mimscale train RECIPE`: parse, check, train; or show the whole recipe."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from pathlib import Path

import yaml

from mimscale.config.recipes import load_recipe
from mimscale.errors import warn
from mimscale.files.command_line import end_with_example


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="name (`mimscale recipes` lists them) or path to a YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="changes to the recipe")
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="the run's folder (default: runs/RECIPE); resumes what it holds"
    )
    parser.add_argument("--fork", type=Path, metavar="NEW", help="start a new run in NEW from --run-dir's weights")
    parser.add_argument("--show", action="store_true", help="print the whole recipe with all defaults, train nothing")
    end_with_example(
        parser,
        "mimscale train mae_vit_l16 --run-dir runs/l16 data.shards=shards/imagenet-train",
        "torchrun --nproc-per-node 8 -m mimscale train mae_vit_l16 schedule.global_batch=2048",
        "mimscale train mae_tiny --show optim.betas=[0.9,0.98]",
    )


def run(args: argparse.Namespace) -> int:
    if args.show:
        print(yaml.safe_dump(load_recipe(args.recipe, args.overrides).dump(), sort_keys=False), end="")
        return 0
    # here, because a recipe that is only shown does not wait for DeepSpeed
    from mimscale.distributed import world
    from mimscale.fault_tolerance.preemption import INTERRUPTED
    from mimscale.monitoring.metrics import StartupTimer
    from mimscale.training.checked_run import prepare
    from mimscale.training.loop import train

    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        warn(f"starting {args.recipe}: imports, checks, model, engine and workers come before the first step")
    startup = StartupTimer()
    startup.end("imports")
    config = load_recipe(args.recipe, args.overrides)
    run_dir = args.run_dir or Path("runs") / Path(args.recipe).stem
    checked = prepare(config, run_dir, args.fork, tuple(sys.argv), args.recipe)
    startup.end("checks")
    closing = ExitStack()
    interrupted = train(checked, startup, closing)
    world.close_process_group()
    closing.close()
    return INTERRUPTED if interrupted else 0
