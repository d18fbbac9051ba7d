"""The command line: `python -m mimscale VERB ...`, or `mimscale VERB ...`. Parses, calls, prints."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from mimscale import __version__
from mimscale.distributed.end_process import end_process
from mimscale.errors import Stopped, UserError, printable, warn
from mimscale.files.command_line import Parser, end_with_example

VERBS = {
    "train": ("mimscale.training.cli", "pre-train a student; resumes what the run folder holds"),
    "recipes": ("mimscale.config.recipe_table", "list the recipes of this package: what each should reach and cost"),
    "runs": ("mimscale.runs.cli", "the runs below a folder: status, step, loss, evaluation; what differs between runs"),
    "evaluate": ("mimscale.api.evaluate", "accuracy of frozen features: kNN, linear, low-shot and more"),
    "results": ("mimscale.evals.results", "what the evaluations of a run found, beside what its recipe expects"),
    "report": ("mimscale.report.cli", "a page of curves, panels and figures of runs, in one file"),
    "convert": (
        "mimscale.convert.cli",
        "official checkpoints <-> ours <-> timm, transformers; each with an equality check",
    ),
    "reconstruct": ("mimscale.api.cli", "masked images and their reconstructions, in one image"),
    "plan": ("mimscale.cost.cli", "what a run needs, takes and costs on a cluster, before it is submitted"),
    "doctor": ("mimscale.doctor.cli", "check this machine, a recipe, its data and its teachers"),
    "bench": ("mimscale.bench", "measurements behind the documentation's tables"),
    "completion": ("mimscale.config.completion", "print the script that completes this command in bash or zsh"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 fine, 2 bad input, 4 a run that ended itself (one line each), else a failure's traceback."""
    with suppress(AttributeError, OSError):  # of a notebook, which shows any text, or of another stream
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names that are not UTF-8
    arguments = without_local_rank(list(sys.argv[1:] if argv is None else argv))
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"mimscale {' '.join(arguments[:1])}: interrupted", file=sys.stderr)
        return 130


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """The arguments without `--local_rank=N`, which deepspeed and torch.distributed.launch put before all others.

    They set LOCAL_RANK to the same number; where it is missing, it is set here.
    """
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        name, separator, value = word.partition("=")
        if name not in ("--local_rank", "--local-rank"):
            rest.append(word)
            continue
        os.environ.setdefault("LOCAL_RANK", value if separator else next(words, ""))
    return rest


def make_parser(verbs: Collection[str]) -> tuple[argparse.ArgumentParser, dict[str, Any]]:
    """The parser, and the modules of the verbs that are named: only these are imported and know their arguments."""
    parser = Parser(prog="mimscale", description="Masked-image-modeling pre-training at scale.")
    parser.add_argument("--version", action="version", version=f"mimscale {__version__}")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    modules = {}
    for name, (path, text) in VERBS.items():
        sub = subparsers.add_parser(name, help=text, description=text)
        if name in verbs:
            modules[name] = importlib.import_module(path)
            modules[name].add_arguments(sub)
    end_with_example(parser, "mimscale train --help", "mimscale train mae_tiny --show")
    return parser, modules


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """argparse takes positionals in one place only; overrides of a recipe may also follow the options."""
    args, rest = parser.parse_known_args(arguments)
    if hasattr(args, "overrides"):
        overrides = [word for word in rest if not word.startswith("-")]
        args.overrides += overrides
        rest = [word for word in rest if word not in overrides]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _run(arguments: Sequence[str]) -> int:
    chosen = next((word for word in arguments if not word.startswith("-")), "")
    parser, modules = make_parser(VERBS if chosen == "completion" else (chosen,))
    args = parse(parser, arguments)
    if chosen == "completion":
        args.parser = parser
    module = modules[args.verb]
    try:
        return int(module.run(args))
    except (UserError, Stopped) as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not getattr(error, "everywhere", False):
            warn(f"mimscale {args.verb}: {'' if rank == '0' else f'rank {rank}: '}{error}")
        return 2 if isinstance(error, UserError) else Stopped.code
    except OSError as error:
        if args.verb == "train":  # whose failures have their own ways
            raise
        if isinstance(error, BrokenPipeError):
            warn(f"mimscale {args.verb}: nobody reads its output any more, or a process that it needs has ended")
            return 128 + signal.SIGPIPE
        where = "" if error.filename is None else f"{printable(str(error.filename))}: "
        warn(f"mimscale {args.verb}: {where}{error.strerror or error}; name another place, or make it readable")
        return 2


def answer_early_signals(arguments: Sequence[str]) -> None:
    """Until a training run has its own handlers: a signal in the seconds of imports and checks ends it with one line.

    What the parent ignores stays ignored, as the batch scripts do it with SIGUSR1.
    """
    if next((word for word in without_local_rank(arguments) if not word.startswith("-")), None) != "train":
        return
    for number in (signal.SIGTERM, signal.SIGUSR1):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _leave_early)


def _leave_early(number: int, frame: object) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        warn(f"stopped before the first step ({signal.Signals(number).name})")
    os._exit(128 + signal.SIGTERM)


def entry() -> NoReturn:
    """The console script."""
    answer_early_signals(sys.argv[1:])
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:
        warn(traceback.format_exc().rstrip())
        code = 1
    end_process(code)


if __name__ == "__main__":
    entry()
