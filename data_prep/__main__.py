"""python -m data_prep VERB: makes and checks data sets of tar shards."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path

import numpy as np

from data_prep.digits import write_digits
from data_prep.doctor import Job, examine
from data_prep.fashion import SPLITS, read_fashion
from data_prep.folder import read_folder
from data_prep.imagenet import check_md5, read_21k, read_train, read_val
from data_prep.images import ImageOptions
from data_prep.index import IndexOptions, index_shards
from data_prep.info import describe_set, figures_of_set
from data_prep.plan import ShardPlan, Source, describe
from data_prep.reports import SHOWN, report
from data_prep.shard_list import list_shards
from data_prep.table import TableOptions, read_table
from data_prep.torchvision_sets import SETS, read_sets
from data_prep.verify import duplicates, verify
from data_prep.write_manifest import write_manifest
from data_prep.write_shards import estimate, unfinished, write
from mimscale.data.manifest import Manifest
from mimscale.data.names import one_line
from mimscale.data.synthetic import make_image_folder
from mimscale.errors import UserError, warn
from mimscale.files.command_line import Parser, add_json, end_with_example, print_json, stdout_kept
from mimscale.files.durations import duration
from mimscale.files.progress import progress, working

FILES = "only the files of SRC with such names, for example 'train-*'"
CLASSES = "names of the classes, one per line, from class 0 on"
LARGEST_SIZE = 1 << 24  # of ranks, images or workers
SKIP_UNLABELLED = "leave out images whose label is missing, empty, NaN or -1, instead of refusing them"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 damage found, 2 bad input, a full disk or a killed worker, 130 interrupted."""
    options = make_parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):  # names may have bytes that no terminal can show
        with suppress(AttributeError, OSError):  # of a notebook, which shows any text, or of another stream
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = int(options.run(options))
        if sys.stdout is not None:  # of a caller that prints nothing
            sys.stdout.flush()
        return code
    except UserError as error:
        warn(f"data_prep: {error}")
        return 2
    except BrokenPipeError:  # nobody reads what is printed: `| head`
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's exit would fail
        return 141
    except OSError as error:  # a full disk above all
        where = f" ('{error.filename}')" if error.filename else ""
        print(
            f"data_prep: {error.strerror or error}{where}; fix it, then the same command continues where it stopped",
            file=sys.stderr,
        )
        return 2
    except BrokenProcessPool:
        warn(
            "data_prep: a worker process was killed, as the system does it where memory is short; give fewer --jobs, "
            "then the same command continues where it stopped"
        )
        return 2
    except KeyboardInterrupt:
        print("data_prep: interrupted; the same command continues where this one stopped", file=sys.stderr)
        return 130


def _folder(options: argparse.Namespace) -> int:
    classes = _lines(options.classes) if options.classes else None
    with progress("listing", 0, "files") as advance:
        source = read_folder(options.source, not options.unlabelled, classes, advance, options.files)
    return _write(options, source)


def _table(options: argparse.Namespace) -> int:
    chosen = TableOptions(
        image=options.image,
        label=options.label,
        classes=_lines(options.classes) if options.classes else None,
        skip_unlabelled=options.skip_unlabelled,
        skip_missing=options.skip_missing,
        files=options.files,
        where=options.where,
        delimiter=options.delimiter,
    )
    with progress("listing", 0, "rows") as advance:
        source = read_table(options.source, options.root, chosen, advance)
    return _write(options, source)


def _imagenet(options: argparse.Namespace) -> int:
    if options.val and not options.truth:
        raise UserError("--val needs --truth FILE: the devkit's tar.gz, LOC_val_solution.csv or the ground-truth text")
    if options.md5:
        files = [
            file for file in (options.train, options.val, options.truth) if file and file.suffix in (".tar", ".gz")
        ]
        with progress("checking md5", sum(file.stat().st_size for file in files if file.exists()), "bytes") as advance:
            check_md5(files, advance)
    with progress("listing", 0) as advance:
        if options.train:
            source = read_train(options.train, advance)
        else:
            source = read_val(options.val, options.truth, options.synsets, advance)
    return _write(options, source)


def _imagenet_21k(options: argparse.Namespace) -> int:
    with progress("listing", 0) as advance:
        source = read_21k(options.source, advance)
    return _write(options, source)


def _torchvision(options: argparse.Namespace) -> int:
    top = options.destination
    with working(f"reading {options.name}", moving=not options.download):  # torchvision's download draws its own bar
        sources = read_sets(options.name, options.root, options.split, options.download)  # before anything is written
    for split, source in sources.items():
        options.destination = top / split
        _write(options, source)
    return 0


def _write(options: argparse.Namespace, source: Source) -> int:
    images = ImageOptions(options.check, options.transcode, options.short_side, options.quality)
    plan = ShardPlan(
        source, seed=options.seed, shard_mb=options.shard_mb, shard_samples=options.shard_samples, images=images
    )
    classes = f"{len(source.classes):,} classes" if source.classes else "no labels"
    skipped = f"; left out: {describe(source.skipped)}" if source.skipped else ""
    print(
        f"{len(plan.items):,} images, {classes}, {plan.bytes / 2**20:,.1f} MiB in {plan.shards:,} shards{skipped}",
        file=sys.stderr,
    )
    if options.dry_run:
        with working("estimating"):
            processed, seconds = estimate(plan, options.jobs)
        print(
            f"about {duration(seconds)} with --jobs {options.jobs}, estimated from {processed:,} images; add the time "
            "for writing to the disk, divide by the number of parts of an array",
            file=sys.stderr,
        )
        return 0
    todo = unfinished(plan, options.destination, options.part)
    with progress("writing", sum(len(plan.shard(number)) for number in todo)) as advance:
        missing = write(plan, options.destination, todo, jobs=options.jobs, done=advance)
    return _report_done(options.destination, missing)


def _finish(options: argparse.Namespace) -> int:
    for folder in options.destination:
        with working(f"finishing {folder}"):
            missing = write_manifest(folder, options.wait)
        if missing:
            raise UserError(
                f"'{folder}' lacks {len(missing):,} shards, the first is number {missing[0]}; run its command again"
            )
        _report_done(folder, missing)
    return 0


def _report_done(folder: Path, missing: list[int]) -> int:
    if missing:
        print(f"{folder}: this part is done; {len(missing):,} shards of other parts are missing", file=sys.stderr)
        return 0
    file = Manifest.load(folder).file
    for how, count in file.changed.items():
        print(f"{count:,} images were {how}", file=sys.stderr)
    report("left out", [f"{key}: {reason}" for key, reason in list(file.left_out.items())[:SHOWN]], folder)
    left_out = f", {sum(file.skipped.values()):,} left out" if file.skipped else ""
    print(f"{folder}: complete, {file.samples:,} images{left_out}", file=sys.stderr)
    return 0


def _fashion(options: argparse.Namespace) -> int:
    top = options.destination
    with working("reading Fashion-MNIST"):
        sources = {split: read_fashion(options.source, split) for split in SPLITS}  # both, before anything is written
    for split, source in sources.items():
        options.destination = top / split
        _write(options, source)
    return 0


def _digits(options: argparse.Namespace) -> int:
    with working("writing digits"):
        counts = write_digits(options.destination, options.side, options.seed)
    for name, count in counts.items():
        print(f"{options.destination / name}: {count:,} images", file=sys.stderr)
    return 0


def _synthetic(options: argparse.Namespace) -> int:
    count = options.classes * options.per_class
    with progress("writing", count) as advance:
        make_image_folder(
            options.destination, classes=options.classes, per_class=options.per_class, seed=options.seed, done=advance
        )
    print(f"{options.destination}: {count:,} images", file=sys.stderr)
    return 0


def _index(options: argparse.Namespace) -> int:
    with working("listing shards"):
        shards = list_shards(options.source, options.files)
    chosen = IndexOptions(
        image=options.image.lower().removeprefix(".") if options.image else None,
        label=options.label,
        classes=_lines(options.classes) if options.classes else None,
        skip_unlabelled=options.skip_unlabelled,
        skip_bad=options.skip_bad,
        checksums=options.checksums,
        files=options.files,
    )
    with progress("indexing", len(shards.names), "shards") as advance:
        target = index_shards(shards, chosen, to=options.to, jobs=options.jobs, done=advance)
    _print_set(options, target)
    return 0


def _print_set(options: argparse.Namespace, folder: Path, every_class: bool = False, **more: object) -> None:
    """The lines about a data set, or with --json its figures and what else is known of it."""
    if options.json:
        print_json({**figures_of_set(folder, every_class), **more})
    else:
        print("\n".join(map(one_line, describe_set(folder, every_class))))


def _verify(options: argparse.Namespace) -> int:
    manifest = Manifest.load(options.destination, check_shards=False)
    damage: list[list[str]] = []  # of each shard
    hashes = []
    with progress("verifying", manifest.samples) as advance:
        for checked in verify(options.destination, decode_all=options.decode, jobs=options.jobs):
            damage += [checked.damage] if checked.damage else []
            hashes.append(checked.hashes)
            advance(checked.samples)
    if options.samples is not None and manifest.samples != options.samples:
        damage.append([f"{manifest.samples:,} samples, not {options.samples:,}"])
    if not options.json:
        _print_set(options, options.destination)
    copies: list[str] = []
    if not damage:
        with working("comparing images"):
            same = duplicates(manifest, np.concatenate(hashes))
        copies = [" = ".join(manifest.key(sample) for sample in group) for group in same]
        with stdout_kept(options.json):
            print(f"{sum(map(len, same)) - len(same):,} images are copies of another")
            for pair in copies if options.duplicates else copies[:5]:
                print(f"same: {one_line(pair)}")
    lines = [faults[0] for faults in damage] + [fault for faults in damage for fault in faults[1:]]
    rest = report("damaged", lines, options.destination / "damaged.txt", sys.stderr if options.json else sys.stdout)
    if options.json:
        _print_set(options, options.destination, faults=lines, copies=copies)
    else:
        print(f"{len(lines):,} faults{rest}" if damage else "undamaged")
    return 1 if damage else 0


def _info(options: argparse.Namespace) -> int:
    _print_set(options, options.destination, options.classes)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    job = Job(
        ranks=options.ranks,
        global_batch=options.global_batch,
        workers=options.workers,
        ranks_per_node=options.ranks_per_node,
        streams=options.streams,
        block=options.block,
        labels=options.labels,
    )
    with working("checking"):
        findings = examine(options.destination, job)
    problems = sum(bool(finding.fix) for finding in findings)
    if options.json:
        print_json({"to_fix": problems, "findings": [{"text": one.text, "fix": one.fix or None} for one in findings]})
        return 1 if problems else 0
    for finding in findings:
        text, fix = one_line(finding.text), one_line(finding.fix)
        print(f"ok   {text}" if not fix else f"FIX  {text}\n     -> {fix}")
    print(f"{problems:,} to fix" if problems else "fit")
    return 1 if problems else 0


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n").split("\n")
        return lines[:-1] if lines[-1] == "" else lines
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"list '{path}' cannot be read: {error}") from None


def make_parser() -> argparse.ArgumentParser:
    text = "Make and check data sets of tar shards."
    top = Parser(prog="python -m data_prep", description=text)
    verbs = top.add_subparsers(required=True, metavar="VERB")

    folder = verbs.add_parser("folder", help="shards from a folder of images, SRC/CLASS/*.jpg")
    folder.add_argument("source", type=Path, metavar="SRC")
    folder.add_argument("--classes", type=Path, metavar="FILE", help=CLASSES)
    folder.add_argument("--files", metavar="PATTERN", help=FILES)
    folder.add_argument("--unlabelled", action="store_true", help="take every image below SRC, without classes")
    _add_writing(folder, "folder images/train shards/train --jobs 8")
    folder.set_defaults(run=_folder)

    table = verbs.add_parser("table", help="shards from a list of images: .txt, .csv, .tsv or .parquet")
    table.add_argument("source", type=Path, metavar="SRC", help="the file, or a folder of .parquet files")
    table.add_argument("--files", metavar="PATTERN", help=FILES)
    table.add_argument("--where", metavar="COLUMN=VALUE", help="only rows with this value, for example split=train")
    table.add_argument("--root", type=Path, metavar="DIR", help="folder of relative paths (default: the folder of SRC)")
    table.add_argument(
        "--image", metavar="COLUMN", help="of image paths or bytes (default: the first of the usual names)"
    )
    table.add_argument("--label", metavar="COLUMN", help="number or name of the class; none = unlabelled")
    table.add_argument("--classes", type=Path, metavar="FILE", help=CLASSES)
    table.add_argument("--delimiter", type=_delimiter, metavar="C", help="of a CSV file (default: found), tab = a tab")
    table.add_argument("--skip-missing", action="store_true", help="leave out files that cannot be read")
    table.add_argument("--skip-unlabelled", action="store_true", help=SKIP_UNLABELLED)
    _add_writing(table, "table train.csv shards/train --image path --label class --jobs 8")
    table.set_defaults(run=_table)

    imagenet = verbs.add_parser(
        "imagenet", help="shards from the official ImageNet-1k archives, read without unpacking"
    )
    split = imagenet.add_mutually_exclusive_group(required=True)
    split.add_argument("--train", type=Path, metavar="TAR", help="ILSVRC2012_img_train.tar")
    split.add_argument(
        "--val", type=Path, metavar="TAR", help="ILSVRC2012_img_val.tar or a folder of its files; needs --truth"
    )
    truth = "ILSVRC2012_devkit_t12.tar.gz, LOC_val_solution.csv, or ILSVRC2012_validation_ground_truth.txt + --synsets"
    imagenet.add_argument("--truth", type=Path, metavar="FILE", help=truth)
    imagenet.add_argument("--synsets", type=Path, metavar="FILE", help="wnids: line i is the class with devkit id i")
    imagenet.add_argument("--md5", action="store_true", help="first compare the archives with their known checksums")
    _add_writing(
        imagenet,
        "imagenet --train ILSVRC2012_img_train.tar --jobs 8 shards/train",
        "imagenet --val ILSVRC2012_img_val.tar --truth LOC_val_solution.csv shards/val",
    )
    imagenet.set_defaults(run=_imagenet)

    larger = verbs.add_parser("imagenet21k", help="shards from ImageNet-21K: a tar of tars, or a folder of wnid.tar")
    larger.add_argument("source", type=Path, metavar="SRC", help="fall11_whole.tar, or a folder of wnid.tar")
    _add_writing(larger, "imagenet21k fall11_whole.tar shards/imagenet21k --jobs 16 --short-side 512")
    larger.set_defaults(run=_imagenet_21k)

    named = verbs.add_parser(
        "torchvision", help="shards of the data sets of transfer tables, from the files that torchvision reads"
    )
    named.add_argument("name", metavar="NAME", help=", ".join(SETS))
    named.add_argument("root", type=Path, metavar="ROOT", help="folder that holds the data set's own folder")
    named.add_argument("--download", action="store_true", help="let torchvision download what is missing")
    named.add_argument("--split", metavar="SPLIT", help="only train, val or unlabelled (default: all that there are)")
    _add_writing(named, "torchvision flowers102 downloads shards/flowers102 --download")
    named.set_defaults(run=_torchvision)
    fashion = verbs.add_parser("fashion", help="shards DST/train and DST/val from the IDX files of Fashion-MNIST")
    where = "folder of the four files, .gz or not: /usr/share/datasets/fashion-mnist of Debian's package "
    where += "dataset-fashion-mnist, or torchvision's download folder"
    fashion.add_argument("source", type=Path, metavar="SRC", help=where)
    _add_writing(fashion, "fashion /usr/share/datasets/fashion-mnist shards/fashion")
    fashion.set_defaults(run=_fashion)

    end = verbs.add_parser("finish", help="write the manifests of folders whose shards all exist")
    end.add_argument("destination", type=Path, nargs="+", metavar="DST")
    end.add_argument(
        "--wait", type=float, default=0, metavar="S", help="how long to wait for the files of other nodes to appear"
    )
    _example(end, "finish shards/imagenet-train --wait 60")
    end.set_defaults(run=_finish)

    digits = verbs.add_parser("digits", help="image folders of real handwritten digits, for experiments")
    digits.add_argument("destination", type=Path, metavar="DST")
    digits.add_argument("--side", type=_positive, default=32, help="pixels (default 32)")
    digits.add_argument("--seed", type=int, default=0, help="of the split into train and test (default 0)")
    _example(digits, "digits images/digits --side 32")
    digits.set_defaults(run=_digits)

    synthetic = verbs.add_parser("synthetic", help="a synthetic image folder of coloured shapes, for experiments")
    synthetic.add_argument("destination", type=Path, metavar="DST")
    synthetic.add_argument("--classes", type=_positive, default=10, help="(default 10)")
    synthetic.add_argument("--per-class", type=_positive, default=100, help="(default 100)")
    synthetic.add_argument("--seed", type=int, default=0)
    _example(synthetic, "synthetic runs/tiny/images --classes 4 --per-class 50")
    synthetic.set_defaults(run=_synthetic)

    index = verbs.add_parser("index", help="a manifest for WebDataset shards that exist; copies nothing")
    where = "folder of .tar files, s3:// or gs:// URL of one, or https://host/part-{000..127}.tar"
    index.add_argument("source", metavar="SRC", help=where)
    index.add_argument("--files", metavar="PATTERN", help=FILES)
    index.add_argument("--to", type=Path, metavar="DST", help="new folder for manifest and links, instead of SRC")
    index.add_argument("--image", metavar="EXT", help="extension of the images, if samples have several")
    label = "extension of the class number, json:KEY, wnid (in the name), or none (default: cls if there is one)"
    index.add_argument("--label", metavar="EXT", help=label)
    index.add_argument("--skip-bad", action="store_true", help="leave out bad shards; info names them")
    index.add_argument("--skip-unlabelled", action="store_true", help=SKIP_UNLABELLED)
    index.add_argument("--classes", type=Path, metavar="FILE", help=CLASSES)
    index.add_argument(
        "--checksums", action="store_true", help="also store the sha256 of every shard, so that changes can be found"
    )
    index.add_argument("--jobs", type=_positive, default=1, metavar="N", help="processes (default 1)")
    add_json(index)
    _example(index, "index shards/laion --files 'part-*' --to shards/laion-index --jobs 16")
    index.set_defaults(run=_index)

    check = verbs.add_parser("verify", help="check finished shards against their manifest; exit code 1 on damage")
    check.add_argument("destination", type=Path, metavar="DST")
    check.add_argument("--decode", action="store_true", help="also decode every image")
    check.add_argument("--samples", type=_positive, metavar="N", help="expected number of samples")
    check.add_argument("--duplicates", action="store_true", help="list all images that are copies of another")
    check.add_argument("--jobs", type=_positive, default=1, metavar="N", help="processes (default 1)")
    add_json(check)
    _example(check, "verify shards/imagenet-train --decode --jobs 8")
    check.set_defaults(run=_verify)

    info = verbs.add_parser("info", help="describe a data set")
    info.add_argument("destination", type=Path, metavar="DST")
    info.add_argument("--classes", action="store_true", help="with the number of samples of every class")
    add_json(info)
    _example(info, "info shards/imagenet-train --classes")
    info.set_defaults(run=_info)

    doctor = verbs.add_parser("doctor", help="check a data set for a job; exit code 1 if something must be fixed")
    doctor.add_argument("destination", type=Path, metavar="DST")
    doctor.add_argument("--ranks", type=_size, required=True, metavar="W", help="data-parallel ranks of all nodes")
    doctor.add_argument("--global-batch", type=_size, required=True, metavar="G")
    doctor.add_argument("--workers", type=_size, default=8, metavar="N", help="per rank (default 8)")
    doctor.add_argument("--ranks-per-node", type=_size, default=8, metavar="N", help="(default 8)")
    doctor.add_argument("--streams", type=_size, default=256, metavar="C", help="data.streams (default 256)")
    doctor.add_argument("--block", type=_size, default=8192, metavar="B", help="data.block (default 8192)")
    doctor.add_argument("--labels", action="store_true", help="the job needs labels")
    add_json(doctor)
    _example(doctor, "doctor shards/imagenet-train --ranks 64 --global-batch 4096")
    doctor.set_defaults(run=_doctor)
    _example(top, "folder --help", "folder images/train shards/train --jobs 8")
    return top


def _example(parser: argparse.ArgumentParser, *commands: str) -> None:
    end_with_example(parser, *(f"python -m data_prep {command}" for command in commands))


def _add_writing(parser: argparse.ArgumentParser, *examples: str) -> None:
    parser.add_argument("destination", type=Path, metavar="DST", help="new folder for the shards and the manifest")
    shards = parser.add_argument_group("shards")
    shards.add_argument("--seed", type=int, default=0, metavar="N", help="of the global shuffle (default 0)")
    shards.add_argument("--shard-mb", type=_positive, default=256, metavar="MB", help="shard size (default 256)")
    shards.add_argument("--shard-samples", type=_positive, metavar="N", help="images per shard, instead of a size")
    shards.add_argument("--jobs", type=_positive, default=1, metavar="N", help="processes (default 1)")
    part = "write only the shards I, I + N, ... (from 0): one task of a job array; the last one writes the manifest"
    shards.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help=part)
    shards.add_argument("--dry-run", action="store_true", help="print what would be written, write nothing")
    images = parser.add_argument_group("images")
    images.add_argument("--no-check", dest="check", action="store_false", help="store them without decoding each one")
    images.add_argument("--transcode", action="store_true", help="store all but RGB and grey JPEGs as RGB JPEGs")
    side = "shrink larger images to this short side in pixels (default: keep all bytes)"
    images.add_argument("--short-side", type=_positive, default=0, metavar="PX", help=side)
    images.add_argument("--quality", type=_quality, default=95, metavar="Q", help="of new JPEGs (default 95)")
    _example(parser, *examples)


def _delimiter(text: str) -> str:
    mark = "\t" if text in ("tab", "\\t") else text
    if len(mark) != 1 or mark in '"\r\n':
        raise argparse.ArgumentTypeError(f"'{text}' must be one character, or tab")
    return mark


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number above 0")
    return int(text)


def _size(text: str) -> int:
    """Of a job: larger numbers would be counted through for ever."""
    number = _positive(text)
    if number > LARGEST_SIZE:
        raise argparse.ArgumentTypeError(f"'{text}' must be at most {LARGEST_SIZE:,}")
    return number


def _quality(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number from 1 to 100")
    return int(text)


def _part(text: str) -> tuple[int, int]:
    index, _, total = text.partition("/")
    if not (index.isdecimal() and total.isdecimal() and int(index) < int(total)):
        raise argparse.ArgumentTypeError(f"'{text}' must be I/N with 0 <= I < N")
    return int(index), int(total)


if __name__ == "__main__":
    sys.exit(main())
