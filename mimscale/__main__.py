"""The command line: `python -m mimscale VERB ...`, or `mimscale VERB ...`. Parses, calls, prints."""

from __future__ import annotations

import argparse
import atexit
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from mimscale import __version__
from mimscale.errors import Stopped, UserError

VERBS = {
    "train": ("mimscale.training.cli", "pre-train a student; resumes what the run folder holds"),
    "recipes": ("mimscale.config.recipe_table", "list the recipes of this package: what each should reach and cost"),
    "evaluate": ("mimscale.evals.cli", "accuracy of frozen features: kNN, linear, few-shot"),
    "convert": ("mimscale.convert.cli", "official checkpoints <-> ours <-> timm, each with an equality check"),
    "reconstruct": ("mimscale.api.cli", "a figure of masked images and their reconstructions"),
    "plan": ("mimscale.cost.cli", "what a run needs, takes and costs on a cluster, before it is submitted"),
    "doctor": ("mimscale.doctor.cli", "check this machine, a recipe, its data and its teachers"),
    "bench": ("mimscale.bench", "measurements behind the documentation's tables"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 fine, 2 bad input, 4 a run that ended itself (one line each), else a failure's traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="mimscale", description="Masked-image-modeling pre-training at scale.")
    parser.add_argument("--version", action="version", version=f"mimscale {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    module = None
    for name, (path, text) in VERBS.items():
        sub = verbs.add_parser(name, help=text, description=text)
        if name == chosen:  # only the verb that runs is imported
            module = importlib.import_module(path)
            module.add_arguments(sub)
    args, rest = parser.parse_known_args(arguments)
    assert module is not None
    overrides = [word for word in rest if not word.startswith("-")]
    if hasattr(args, "overrides"):  # argparse takes positionals in one place only; ours may also follow the options
        args.overrides += overrides
        rest = [word for word in rest if word not in overrides]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(module.run(args))
    except (UserError, Stopped) as error:
        rank = os.environ.get("RANK", "0")
        print(f"mimscale {args.verb}: {'' if rank == '0' else f'rank {rank}: '}{error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else Stopped.code


def end_process(code: int) -> NoReturn:
    """Leave without taking the interpreter apart.

    DeepSpeed keeps process groups beyond their destruction, so their threads still run when the work is done. One that
    asks for the interpreter while it is being taken apart would abort a process that had succeeded.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def entry() -> NoReturn:
    """The console script."""
    end_process(main())


if __name__ == "__main__":
    entry()
