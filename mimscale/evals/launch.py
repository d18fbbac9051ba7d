"""What every evaluation shares on the command line: options, ranks, and where its report goes."""

from __future__ import annotations

import argparse
import hashlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.table import Table

from mimscale.checkpoint import format as checkpoint
from mimscale.checkpoint import run_folder
from mimscale.distributed.coordination import Coordinator
from mimscale.distributed.same_ranks import refuse_different
from mimscale.distributed.world import close_process_group, from_environment
from mimscale.errors import UserError, printable
from mimscale.evals.networks import eval_folder
from mimscale.evals.parallel import join
from mimscale.evals.report import write
from mimscale.evals.runner import Settings
from mimscale.files.command_line import add_json, print_json
from mimscale.files.console import plain_console

T = TypeVar("T")
CROP_PCT = 0.875
MAX_IMAGE_SIZE, MAX_WORKERS = 8192, 1024  # as a recipe's section `data` has them
MAX_SEED = 2**63 - 1
PER_RANK = ("train", "val", "cache", "workers", "out", "json", "device")
"""Options in which nodes may differ: data is compared by its fingerprint, the device after it was found."""


def add_shared(parser: argparse.ArgumentParser, pooled: bool) -> None:
    """Options of every evaluation. pooled: those of pooled features, too."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, checkpoint folder or file")
    if pooled:
        parser.add_argument(
            "--pool",
            nargs="+",
            choices=("mean", "cls"),
            default=["mean"],
            help="patch mean, class token (default mean)",
        )
    parser.add_argument("--ema", action="store_true", help="the moving average of the student, not the student itself")
    parser.add_argument(
        "--image-size", type=at_least(1, MAX_IMAGE_SIZE), metavar="PX", help="default: as the run was trained"
    )
    parser.add_argument(
        "--crop-pct", type=share, default=CROP_PCT, metavar="X", help="share of the short side kept (default 0.875)"
    )
    parser.add_argument("--batch", type=at_least(1), default=256, metavar="N", help="images at a time (default 256)")
    parser.add_argument(
        "--workers",
        type=at_least(0, MAX_WORKERS),
        default=8,
        metavar="N",
        help="processes that read images (default 8)",
    )
    parser.add_argument(
        "--seed", type=at_least(0, MAX_SEED), default=0, metavar="N", help="of random networks and draws (default 0)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="number format of the networks (default bf16 on cuda)"
    )
    parser.add_argument("--baselines", action="store_true", help="raw pixels and each network at random as well")
    stored = parser.add_mutually_exclusive_group()
    stored.add_argument("--cache", type=Path, metavar="DIR", help="keep features there (default RUN/eval/features)")
    stored.add_argument("--no-cache", action="store_true", help="keep features in memory only")
    add_json(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: eval/ in the folder of each run")


def with_ranks(args: argparse.Namespace, work: Callable[[torch.device, Coordinator], T]) -> T:
    """Join the other ranks of this launch and call `work` on each. Raises UserError, also where they were not given the
    same.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    world = from_environment(args.device)
    ranks = join(world)
    with _ended_by_ctrl_c(world.size):
        try:
            if ranks.world > 1:
                given = {
                    f"--{key.replace('_', '-')}": repr(vars(args)[key]) for key in vars(args) if key not in PER_RANK
                }
                refuse_different({**given, "device": world.device.type, **run_folder.code()}, ranks)
            return work(world.device, ranks)
        finally:
            close_process_group()


@contextmanager
def _ended_by_ctrl_c(ranks: int) -> Iterator[None]:
    """Of several ranks each ends at once: Python's own handler is not called while a rank waits for another one.

    Nothing is lost: the feature cache and the checkpoints of a probe are whole whenever a process is killed.
    """
    before = signal.getsignal(signal.SIGINT)
    ours = ranks > 1 and before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


def on_ranks(args: argparse.Namespace, work: Callable[[Settings, Coordinator], T]) -> T | None:
    """The same with the settings of `add_shared`: the result of `work` on rank 0, None on the others."""

    def on_each(device: torch.device, ranks: Coordinator) -> T | None:
        result = work(settings_of(args, device), ranks)
        return result if ranks.rank == 0 else None

    return with_ranks(args, on_each)


def check_out(args: argparse.Namespace) -> None:
    """Raises UserError for a report that is not to be JSON."""
    if args.out is not None and args.out.suffix != ".json":
        raise UserError(f"--out {args.out} must end in .json")


def settings_of(args: argparse.Namespace, device: torch.device) -> Settings:
    return Settings(
        device=device,
        precision=args.precision or ("bf16" if device.type == "cuda" else "fp32"),
        pools=tuple(getattr(args, "pool", ())),
        image_size=args.image_size,
        crop_pct=args.crop_pct,
        batch=args.batch,
        workers=args.workers,
        seed=args.seed,
        ema=args.ema,
        baselines=args.baselines,
        cache=not args.no_cache,
        folder=args.cache,
    )


def publish(
    report: Mapping[str, Any],
    tables: Sequence[Table],
    outs: Sequence[Path],
    as_json: bool = False,
    lines: Sequence[str] = (),
) -> None:
    """The tables first: a file that cannot be written does not cost the numbers. as_json: the report in their place.

    lines: below the tables. Raises UserError.
    """
    console = plain_console()
    if as_json:
        print_json(report)
    else:
        for table in tables:
            console.print(table)
        for line in lines:
            console.print(printable(line), soft_wrap=True)
    for out in outs:
        try:
            write(report, out)
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"{out} cannot be written: {why}; name another file with --out") from None
        if not as_json:
            console.print(printable(f"wrote {out}"), soft_wrap=True)


def default_outs(
    args: argparse.Namespace,
    words: Sequence[str],
    precision: str,
    fingerprints: Sequence[str],
    crop_pct: float | None = CROP_PCT,
) -> list[Path]:
    """--out, or RUN/eval/WORDS-POOL-SETTINGS-DATA-CHECKPOINT.json for each run: a file for each thing to be measured.

    DATA: the start of a sha256 of the data sets' fingerprints. crop_pct: where none is given; None: that of each run.
    """
    if args.out:
        return [args.out]
    settings = {
        "ema": (args.ema, False),
        f"px{args.image_size}": (args.image_size, None),
        f"crop{args.crop_pct or 0:g}": (args.crop_pct or crop_pct, crop_pct),
        f"seed{getattr(args, 'seed', 0)}": (getattr(args, "seed", 0), 0),
        "baselines": (getattr(args, "baselines", False), False),
    }
    changed = [word for word, (value, default) in settings.items() if value != default]
    data = hashlib.sha256("".join(fingerprints).encode()).hexdigest()[:8]
    name = "-".join([*words, *getattr(args, "pool", ()), *changed, precision, data])
    outs = []
    for path in args.runs:
        of = checkpoint.newest(path) or path if (path / "config.yaml").is_file() else path
        outs.append(eval_folder(path) / f"{name}-{of.stem}.json")
    return list(dict.fromkeys(outs))


def share(text: str) -> float:
    """Type of an option: a number in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be a number above 0 and at most 1")
    return value


def at_least(least: int, most: int = MAX_SEED) -> Callable[[str], int]:
    """Type of an option."""

    def whole_number(text: str) -> int:
        if not text.isdecimal() or len(text) > 19 or not least <= int(text) <= most:
            above = "" if most == MAX_SEED else f", {most} at most"
            raise argparse.ArgumentTypeError(f"'{text}' must be a whole number, {least} or more{above}")
        return int(text)

    return whole_number
