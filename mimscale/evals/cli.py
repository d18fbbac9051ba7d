"""mimscale evaluate: accuracy of frozen features, always beside raw pixels and the same network at random."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from mimscale.checkpoint import format as checkpoint
from mimscale.config.base import Strict
from mimscale.distributed import launcher
from mimscale.errors import UserError, printable
from mimscale.evals import top1_cli
from mimscale.evals.options import add_options, config_of, default_suffix
from mimscale.evals.report import table, write
from mimscale.evals.runner import Settings, evaluate, protocol_class, protocol_names
from mimscale.files.console import plain_console

EXAMPLE = """\
`mimscale evaluate PROTOCOL --help` lists the options of a protocol. Example:

  mimscale evaluate knn runs/l16 --train shards/train --val shards/val --k 10
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLE
    protocols = parser.add_subparsers(dest="protocol", required=True, metavar="PROTOCOL", title="protocols")
    for name in protocol_names():
        kind = protocol_class(name)
        text = (kind.__doc__ or name).splitlines()[0]
        usage = f"mimscale evaluate {name} RUN... --train SHARDS --val SHARDS [OPTIONS]"
        own = protocols.add_parser(name, help=text, description=text, usage=usage)
        _add_common(own, pooled="pooled" in kind.needs)
        add_options(own, kind.Config)
    top1_cli.add_parser(protocols, _at_least)


def _add_common(parser: argparse.ArgumentParser, pooled: bool) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, checkpoint folder or file")
    parser.add_argument("--train", type=Path, required=True, metavar="SHARDS", help="labelled data set to learn from")
    parser.add_argument("--val", type=Path, required=True, metavar="SHARDS", help="labelled data set to be tested on")
    if pooled:
        parser.add_argument(
            "--pool",
            nargs="+",
            choices=("mean", "cls"),
            default=["mean"],
            help="patch mean, class token (default mean)",
        )
    parser.add_argument("--ema", action="store_true", help="the moving average of the student, not the student itself")
    parser.add_argument("--image-size", type=_at_least(1), metavar="PX", help="default: as the run was trained")
    parser.add_argument(
        "--crop-pct", type=float, default=0.875, metavar="X", help="share of the short side kept (default 0.875)"
    )
    parser.add_argument("--batch", type=_at_least(1), default=256, metavar="N", help="images at a time (default 256)")
    parser.add_argument(
        "--workers", type=_at_least(0), default=8, metavar="N", help="processes that read images (default 8)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of random networks and draws (default 0)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="number format of the networks (default bf16 on cuda)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: eval/ in the folder of each run")


def run(args: argparse.Namespace) -> int:
    _check_one_process()
    if args.protocol == top1_cli.NAME:
        return _top1(args)
    config = config_of(vars(args), protocol_class(args.protocol).Config)
    if args.out is not None and args.out.suffix != ".json":
        raise UserError(f"--out {args.out} must end in .json")
    device = _device(args.device)
    settings = Settings(
        device=device,
        precision=args.precision or ("bf16" if device.type == "cuda" else "fp32"),
        pools=tuple(getattr(args, "pool", ())),
        image_size=args.image_size,
        crop_pct=args.crop_pct,
        batch=args.batch,
        workers=args.workers,
        seed=args.seed,
        ema=args.ema,
    )
    report = evaluate(args.protocol, config, args.runs, args.train, args.val, settings)
    outs = [args.out] if args.out else list(dict.fromkeys(_default_out(path, args, config) for path in args.runs))
    console = plain_console()
    console.print(table(report))  # first: a file that cannot be written does not cost the numbers
    for out in outs:
        try:
            write(report, out)
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"{out} cannot be written: {why}; name another file with --out") from None
        console.print(printable(f"wrote {out}"), soft_wrap=True)
    return 0


def _top1(args: argparse.Namespace) -> int:
    if args.out is not None and args.out.suffix != ".json":
        raise UserError(f"--out {args.out} must end in .json")
    device = _device(args.device)
    report = top1_cli.measure(
        args.runs,
        args.val,
        device=device,
        precision=args.precision or ("bf16" if device.type == "cuda" else "fp32"),
        image_size=args.image_size,
        crop_pct=args.crop_pct,
        ema=args.ema,
        batch=args.batch,
        workers=args.workers,
    )
    top1_cli.publish(report, top1_cli.out_files(args, report))
    return 0


def _check_one_process() -> None:
    """Several ranks would each measure everything and write the same file."""
    found = launcher.place()
    if found.size > 1:
        raise UserError(
            f"{found.variable} = {found.size}: evaluate runs as one process; start it without torchrun, or with "
            f"srun -n 1"
        )


def _default_out(path: Path, args: argparse.Namespace, config: Strict) -> Path:
    """RUN/eval/PROTOCOL-OPTIONS-POOL-CHECKPOINT.json."""
    if (path / "config.yaml").is_file():
        folder, of = path, checkpoint.newest(path) or path
    else:
        folder, of = (path.parent.parent, path) if path.is_dir() else (path.parent, path)
    words = [args.protocol + default_suffix(config), *getattr(args, "pool", ()), *(["ema"] if args.ema else [])]
    return folder / "eval" / f"{'-'.join(words)}-{of.stem}.json"


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def _at_least(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"'{text}' must be a whole number, {least} or more")
        return int(text)

    return whole_number
