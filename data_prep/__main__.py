"""python -m data_prep VERB: makes and checks data sets of tar shards."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.digits import write_digits
from data_prep.folder import read_folder
from data_prep.imagenet import read_train, read_val
from data_prep.plan import Plan, Source, describe
from data_prep.progress import progress
from data_prep.verify import verify
from data_prep.write import unfinished, write
from mimscale.data.manifest import Manifest
from mimscale.data.synthetic import make_image_folder
from mimscale.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 damage found, 2 bad input, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except UserError as error:
        print(f"data_prep: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data_prep: interrupted; the same command continues where this one stopped", file=sys.stderr)
        return 130


def _folder(options: argparse.Namespace) -> int:
    return _write(options, read_folder(options.source, labelled=not options.unlabelled))


def _imagenet(options: argparse.Namespace) -> int:
    if options.train:
        return _write(options, read_train(options.train))
    if not options.truth:
        raise UserError("--val needs --truth FILE: the devkit's tar.gz, LOC_val_solution.csv or the ground-truth text")
    return _write(options, read_val(options.val, options.truth, options.synsets))


def _write(options: argparse.Namespace, source: Source) -> int:
    plan = Plan(source, seed=options.seed, shard_mb=options.shard_mb, shard_samples=options.shard_samples)
    classes = f"{len(source.classes):,} classes" if source.classes else "no labels"
    skipped = f"; left out: {describe(source.skipped)}" if source.skipped else ""
    print(
        f"{len(plan.items):,} images, {classes}, {plan.bytes / 2**20:,.1f} MiB in {plan.shards:,} shards{skipped}",
        file=sys.stderr,
    )
    if options.dry_run:
        return 0
    todo = unfinished(plan, options.destination, options.part)
    with progress("writing", sum(len(plan.shard(number)) for number in todo)) as advance:
        complete = write(plan, options.destination, todo, jobs=options.jobs, done=lambda shard: advance(shard.count))
    state = "complete" if complete else "this part is done; other parts are missing"
    print(f"{options.destination}: {state}", file=sys.stderr)
    return 0


def _digits(options: argparse.Namespace) -> int:
    for name, count in write_digits(options.destination, options.side, options.seed).items():
        print(f"{options.destination / name}: {count:,} pictures", file=sys.stderr)
    return 0


def _synthetic(options: argparse.Namespace) -> int:
    make_image_folder(options.destination, classes=options.classes, per_class=options.per_class, seed=options.seed)
    print(f"{options.destination}: {options.classes * options.per_class:,} pictures", file=sys.stderr)
    return 0


def _verify(options: argparse.Namespace) -> int:
    manifest = Manifest.load(options.destination, check_shards=False)
    damage = []
    with progress("verifying", manifest.samples) as advance:
        for samples, lines in verify(options.destination, decode_all=options.decode, jobs=options.jobs):
            damage += lines
            advance(samples)
    print(f"{manifest.samples:,} samples in {len(manifest.counts):,} shards, fingerprint {manifest.fingerprint}")
    if manifest.labels is not None and manifest.classes is not None:
        sizes = np.bincount(manifest.labels[manifest.labels >= 0], minlength=len(manifest.classes))
        print(
            f"{len(sizes):,} classes of {sizes.min():,} to {sizes.max():,} samples (median {int(np.median(sizes)):,})"
        )
    for line in damage:
        print(f"damaged: {line}")
    print(f"{len(damage):,} faults" if damage else "whole")
    return 1 if damage else 0


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m data_prep", description="Make and check data sets of tar shards.")
    verbs = top.add_subparsers(required=True, metavar="VERB")

    folder = verbs.add_parser("folder", help="shards from a folder of pictures, SRC/CLASS/*.jpg")
    folder.add_argument("source", type=Path, metavar="SRC")
    folder.add_argument("--unlabelled", action="store_true", help="take every picture below SRC, without classes")
    _add_writing(folder)
    folder.set_defaults(run=_folder)

    imagenet = verbs.add_parser("imagenet", help="shards from the official ImageNet-1k archives, read in place")
    split = imagenet.add_mutually_exclusive_group(required=True)
    split.add_argument("--train", type=Path, metavar="TAR", help="ILSVRC2012_img_train.tar")
    split.add_argument("--val", type=Path, metavar="TAR", help="ILSVRC2012_img_val.tar; needs --truth")
    truth = "ILSVRC2012_devkit_t12.tar.gz, LOC_val_solution.csv, or ILSVRC2012_validation_ground_truth.txt + --synsets"
    imagenet.add_argument("--truth", type=Path, metavar="FILE", help=truth)
    imagenet.add_argument("--synsets", type=Path, metavar="FILE", help="wnids: line i is the class with devkit id i")
    _add_writing(imagenet)
    imagenet.set_defaults(run=_imagenet)

    digits = verbs.add_parser("digits", help="picture folders of real handwritten digits, for trying things out")
    digits.add_argument("destination", type=Path, metavar="DST")
    digits.add_argument("--side", type=_positive, default=32, help="pixels (default 32)")
    digits.add_argument("--seed", type=int, default=0, help="of the split into train and test (default 0)")
    digits.set_defaults(run=_digits)

    synthetic = verbs.add_parser("synthetic", help="a picture folder of made-up shapes, for trying things out")
    synthetic.add_argument("destination", type=Path, metavar="DST")
    synthetic.add_argument("--classes", type=_positive, default=10, help="(default 10)")
    synthetic.add_argument("--per-class", type=_positive, default=100, help="(default 100)")
    synthetic.add_argument("--seed", type=int, default=0)
    synthetic.set_defaults(run=_synthetic)

    check = verbs.add_parser("verify", help="check finished shards against their manifest; exit code 1 on damage")
    check.add_argument("destination", type=Path, metavar="DST")
    check.add_argument("--decode", action="store_true", help="also decode every picture")
    check.add_argument("--jobs", type=_positive, default=1, metavar="N", help="processes (default 1)")
    check.set_defaults(run=_verify)
    return top


def _add_writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("destination", type=Path, metavar="DST", help="new folder for the shards and the manifest")
    parser.add_argument("--seed", type=int, default=0, help="of the global shuffle (default 0)")
    parser.add_argument("--shard-mb", type=_positive, default=256, metavar="MB", help="shard size (default 256)")
    parser.add_argument("--shard-samples", type=_positive, metavar="N", help="pictures per shard, instead of a size")
    parser.add_argument("--jobs", type=_positive, default=1, metavar="N", help="processes (default 1)")
    part = "write only the shards I, I + N, ... (from 0): one member of a job array; the last one writes the manifest"
    parser.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help=part)
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, write nothing")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number above 0")
    return int(text)


def _part(text: str) -> tuple[int, int]:
    index, _, total = text.partition("/")
    if not (index.isdecimal() and total.isdecimal() and int(index) < int(total)):
        raise argparse.ArgumentTypeError(f"'{text}' must be I/N with 0 <= I < N")
    return int(index), int(total)


if __name__ == "__main__":
    sys.exit(main())
