"""mimscale evaluate: accuracy of frozen features, as one process or as the ranks of torchrun or srun."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mimscale.checkpoint import format as checkpoint
from mimscale.config.base import Strict
from mimscale.distributed.coordination import Coordinator
from mimscale.distributed.world import close_process_group, from_environment
from mimscale.errors import UserError, printable
from mimscale.evals.networks import eval_folder
from mimscale.evals.options import add_options, config_of, default_suffix
from mimscale.evals.parallel import join
from mimscale.evals.report import lines, table, write
from mimscale.evals.runner import Settings, evaluate, protocol_class, protocol_names
from mimscale.files.console import plain_console

CROP_PCT = 0.875
EXAMPLE = """\
`mimscale evaluate PROTOCOL --help` lists the options of a protocol. Example:

  mimscale evaluate knn runs/l16 --train shards/train --val shards/val --k 10
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLE
    protocols = parser.add_subparsers(dest="protocol", required=True, metavar="PROTOCOL", title="protocols")
    for name in protocol_names():
        kind = protocol_class(name)
        text = (kind.__doc__ or name).splitlines()[0].replace("%", "%%")
        usage = f"mimscale evaluate {name} RUN... --train SHARDS --val SHARDS [OPTIONS]"
        own = protocols.add_parser(name, help=text, description=text, usage=usage)
        _add_common(own, pooled="pooled" in kind.needs)
        add_options(own, kind.Config)


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
        "--crop-pct", type=float, default=CROP_PCT, metavar="X", help="share of the short side kept (default 0.875)"
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
    parser.add_argument("--baselines", action="store_true", help="raw pixels and each network at random as well")
    stored = parser.add_mutually_exclusive_group()
    stored.add_argument("--cache", type=Path, metavar="DIR", help="keep features there (default RUN/eval/features)")
    stored.add_argument("--no-cache", action="store_true", help="keep features in memory only")
    parser.add_argument("--json", action="store_true", help="print the report in place of the table")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: eval/ in the folder of each run")


def run(args: argparse.Namespace) -> int:
    config = config_of(vars(args), protocol_class(args.protocol).Config)
    if args.out is not None and args.out.suffix != ".json":
        raise UserError(f"--out {args.out} must end in .json")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    world = from_environment(args.device)
    ranks = join(world)
    try:
        return _measure(args, config, world.device, ranks)
    finally:
        close_process_group()


def _measure(args: argparse.Namespace, config: Strict, device: torch.device, ranks: Coordinator) -> int:
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
        baselines=args.baselines,
        cache=not args.no_cache,
        folder=args.cache,
    )
    report = evaluate(args.protocol, config, args.runs, args.train, args.val, settings, ranks)
    ranks.on_rank0(_publish, report, args, config)
    return 0


def _publish(report: Mapping[str, Any], args: argparse.Namespace, config: Strict) -> None:
    outs = [args.out] if args.out else _default_outs(report, args, config)
    console = plain_console()
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        console.print(table(report))  # first: a file that cannot be written does not cost the numbers
        for line in lines(report):
            console.print(printable(line), soft_wrap=True)
    for out in outs:
        try:
            write(report, out)
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"{out} cannot be written: {why}; name another file with --out") from None
        if not args.json:
            console.print(printable(f"wrote {out}"), soft_wrap=True)


def _default_outs(report: Mapping[str, Any], args: argparse.Namespace, config: Strict) -> list[Path]:
    """RUN/eval/PROTOCOL-OPTIONS-POOL-SETTINGS-DATA-CHECKPOINT.json: a file for each thing that can be measured.

    DATA: the start of a sha256 of both data sets' fingerprints.
    """
    settings = {
        "ema": (args.ema, False),
        f"px{args.image_size}": (args.image_size, None),
        f"crop{args.crop_pct:g}": (args.crop_pct, CROP_PCT),
        f"seed{args.seed}": (args.seed, 0),
        "baselines": (args.baselines, False),
    }
    changed = [word for word, (value, default) in settings.items() if value != default]
    data = report["train"]["fingerprint"] + report["val"]["fingerprint"]
    words = [args.protocol + default_suffix(config), *getattr(args, "pool", ()), *changed]
    words += [report["protocol"]["precision"], hashlib.sha256(data.encode()).hexdigest()[:8]]
    outs = []
    for path in args.runs:
        of = checkpoint.newest(path) or path if (path / "config.yaml").is_file() else path
        outs.append(eval_folder(path) / f"{'-'.join([*words, of.stem])}.json")
    return list(dict.fromkeys(outs))


def _at_least(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"'{text}' must be a whole number, {least} or more")
        return int(text)

    return whole_number
