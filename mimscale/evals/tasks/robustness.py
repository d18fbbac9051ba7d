"""A classifier under other images: ImageNet-A, -R, -Sketch, -V2, ReaL's labels, and ImageNet-C.

Sources: A (Hendrycks et al., CVPR 2021, arXiv 1907.07174), R (Hendrycks et al., ICCV 2021, arXiv 2006.16241), Sketch
(Wang et al., NeurIPS 2019, arXiv 1905.13549), V2 (Recht et al., ICML 2019, arXiv 1902.10811), ReaL (Beyer et al. 2020,
arXiv 2006.07159), C (Hendrycks and Dietterich, ICLR 2019, arXiv 1903.12261). The classifier is a fine-tuned run, or a
logistic regression on frozen features (`--train`). C is stored at 224 pixels and not cropped again, as in its release.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from mimscale.checkpoint.run_folder import git_commit
from mimscale.data.manifest import Manifest
from mimscale.distributed.coordination import Coordinator
from mimscale.errors import UserError, printable
from mimscale.evals.launch import CROP_PCT, add_shared, check_out, default_outs, on_ranks, publish
from mimscale.evals.metrics import top1
from mimscale.evals.overlap import OWN, check_apart_from_training
from mimscale.evals.robustness.classes import outputs_of
from mimscale.evals.robustness.classifiers import Classifier
from mimscale.evals.robustness.corruptions import (
    ALEXNET,
    SEVERITIES,
    corrupted_sets,
    corruption_errors,
    mean_corruption_error,
)
from mimscale.evals.robustness.heads import classifiers_of, predictions_of
from mimscale.evals.robustness.real import covered, real_accuracy, real_labels
from mimscale.evals.runner import Settings
from mimscale.files.command_line import end_with_example

SUMMARY = "ImageNet-A, -R, -Sketch, -V2, -C and ReaL with a classifier"
VAL, REAL, MCE = "val", "ReaL", "mCE"


@dataclass(frozen=True)
class Wanted:
    """What is to be measured. sets: name -> shards. corruptions: folder of CORRUPTION/SEVERITY."""

    sets: dict[str, Path]
    val: Path | None = None
    real: Path | None = None
    corruptions: Path | None = None


@dataclass(frozen=True)
class TestSet:
    """An opened data set. cropped: its images are to be cropped as the classifier does it; else they are whole."""

    name: str
    manifest: Manifest
    cropped: bool = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, pooled=True)
    parser.set_defaults(crop_pct=0.0)  # that of each classifier
    parser.add_argument(
        "--sets",
        nargs="+",
        default=[],
        metavar="NAME=SHARDS",
        help="test sets: a=shards/imagenet-a r=shards/imagenet-r",
    )
    parser.add_argument("--val", type=Path, metavar="SHARDS", help="ImageNet's validation set itself")
    parser.add_argument("--real", type=Path, metavar="FILE", help="real.json, labels of --val")
    parser.add_argument("--corruptions", type=Path, metavar="DIR", help="ImageNet-C: shards DIR/CORRUPTION/SEVERITY")
    parser.add_argument("--train", type=Path, metavar="SHARDS", help="fit a linear head to frozen features of these")
    parser.add_argument(
        "--classes-of", type=Path, metavar="SHARDS", help="names of a run's outputs (default its data.shards)"
    )
    end_with_example(parser, "mimscale evaluate robustness runs/ft --sets a=shards/imagenet-a r=shards/imagenet-r")


def run(args: argparse.Namespace) -> int:
    check_out(args)
    wanted = Wanted(_named(args.sets), args.val, args.real, args.corruptions)
    if args.real and not args.val:
        raise UserError(f"--real {args.real} has labels of --val SHARDS, which is missing; add it")
    if args.baselines and not args.train:
        raise UserError("--baselines are measured with a linear head; add --train SHARDS, or leave it out")
    if not (wanted.sets or args.val or args.corruptions):
        raise UserError("nothing to measure; give --sets, --val or --corruptions")
    report = on_ranks(
        args,
        lambda settings, ranks: robustness(args.runs, wanted, settings, ranks, args.train, args.classes_of),
    )
    words = ["robustness", *(["linear"] if args.train else []), *(["real"] if args.real else []), *wanted.sets]
    words += ["c"] if args.corruptions else []
    if report is not None:
        prints = [one["fingerprint"] for one in report["sets"].values()]
        prints += [str(report["protocol"][key]) for key in ("train", "real", "classes_of") if report["protocol"][key]]
        crop_pct = CROP_PCT if args.train else None
        outs = default_outs(args, words, report["protocol"]["precision"], prints, crop_pct)
        publish(report, [table(report)], outs, args.json)
    return 0


def robustness(
    runs: Sequence[Path],
    wanted: Wanted,
    settings: Settings,
    ranks: Coordinator,
    train: Path | None = None,
    classes_of: Path | None = None,
) -> dict[str, Any]:
    """The report: a row for each classifier with its percent on each set. Everything that can be refused is refused
    before an image is read. Raises UserError, on all ranks.
    """

    start_s = time.monotonic()

    def prepare() -> tuple[list[TestSet], list[list[int]] | None]:
        sets = [TestSet(name, Manifest.load(path)) for name, path in wanted.sets.items()]
        real = None
        if wanted.val is not None:
            val = Manifest.load(wanted.val)
            sets.insert(0, TestSet(VAL, val))
            real = real_labels(wanted.real, val, len(val.classes or ())) if wanted.real else None
        if wanted.corruptions is not None:
            paths = corrupted_sets(wanted.corruptions)
            sets += [TestSet(_corrupted(*key), Manifest.load(path), cropped=False) for key, path in paths.items()]
        for found in sets:
            if found.manifest.labels is None or found.manifest.classes is None:
                raise UserError(
                    f"{found.manifest.location} has no labels or no names of classes; prepare it by folders"
                )
        return sets, real

    sets, real = ranks.on_all_ranks(prepare)

    def check(names: list[str]) -> None:
        for one in sets:
            outputs_of(one.manifest.classes or [], names, one.manifest.location)

    def check_apart_from(shards: str | None, learned: str) -> None:
        for one in sets:
            if one.cropped:  # the corruptions are none of these images to the byte
                check_apart_from_training(shards, _given(one), one.manifest, learned)

    if train is not None:
        ranks.on_rank0(check_apart_from, str(train), "--train")
    classifiers = classifiers_of(runs, settings, ranks, train, classes_of, check)
    for shards in dict.fromkeys(classifier.about["trained_on"] for classifier in classifiers if train is None):
        ranks.on_rank0(check_apart_from, shards, OWN)
    rows = []
    for classifier in classifiers:
        predictions = {
            one.name: predictions_of(classifier, one.manifest, one.name, settings, ranks, whole=not one.cropped)
            for one in sets
        }
        about = {"image_size": classifier.image_size, "crop_pct": classifier.crop_pct, **classifier.about}
        rows.append({"network": classifier.name, **about, **_results(classifier, sets, predictions, real)})
    return {
        "protocol": {
            "name": "robustness",
            "head": "own" if train is None else "logistic regression",
            "precision": settings.precision,
            "ema": settings.ema,
            "device": torch.cuda.get_device_name() if settings.device.type == "cuda" else "cpu",
            "alexnet": ALEXNET if wanted.corruptions else None,
            "train": None if train is None else Manifest.load(train, check_shards=False).fingerprint,
            "real": None if wanted.real is None else hashlib.sha256(wanted.real.read_bytes()).hexdigest(),
            "classes_of": None if classes_of is None else Manifest.load(classes_of, check_shards=False).fingerprint,
        },
        "columns": [*([VAL] if wanted.val else []), *([REAL] if real else []), *wanted.sets]
        + ([MCE] if wanted.corruptions else []),
        "sets": {
            one.name: {
                "shards": one.manifest.location,
                "samples": one.manifest.samples,
                "fingerprint": one.manifest.fingerprint,
            }
            for one in sets
        },
        "commit": git_commit(),
        "ranks": ranks.world,
        "seconds": round(time.monotonic() - start_s, 1),
        "rows": rows,
    }


def _results(
    classifier: Classifier,
    sets: Sequence[TestSet],
    predictions: Mapping[str, Tensor],
    real: list[list[int]] | None,
) -> dict[str, Any]:
    accuracy, matched = {}, {}
    for one in sets:
        labels = torch.from_numpy(np.array(one.manifest.labels))
        classes = one.manifest.classes or []
        accuracy[one.name] = top1(predictions[one.name], labels, len(classes))
        matched[one.name] = outputs_of(classes, classifier.classes, one.manifest.location)[1]
    results: dict[str, Any] = {name: value for name, value in accuracy.items() if "/" not in name}
    if real is not None:
        results[REAL] = real_accuracy(predictions[VAL], real)
        results["real_images"] = int(covered(real).sum())
    if _corrupted("fog", 1) in accuracy:
        errors = {(n, s): 1 - accuracy[_corrupted(n, s)] / 100 for n in ALEXNET for s in SEVERITIES}
        results[MCE] = mean_corruption_error(errors)
        results["corruption_error"] = corruption_errors(errors)
        results["error"] = {n: [errors[n, s] for s in SEVERITIES] for n in ALEXNET}
    return {**results, "classes_matched": matched}


def _corrupted(name: str, severity: int) -> str:
    return f"{name}/{severity}"


def _given(one: TestSet) -> str:
    return f"--val {one.manifest.location}" if one.name == VAL else f"--sets {one.name}={one.manifest.location}"


def _named(texts: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in texts:
        name, _, path = text.partition("=")
        if not name or not path or "/" in name or name in (VAL, REAL, MCE) or name in found:
            raise UserError(f"--sets {text} is not NAME=SHARDS with a name of its own, such as a=shards/imagenet-a")
        found[name] = Path(path)
    return found


def table(report: Mapping[str, Any]) -> Table:
    """A row per classifier: percent top-1, and mCE, of which less is better."""
    mce = "; mCE: percent of AlexNet's error, less is better" if MCE in report["columns"] else ""
    out = Table(title=f"percent top-1{mce}")
    out.add_column("network")
    for column in report["columns"]:
        out.add_column(printable(column), justify="right")
    for row in report["rows"]:
        out.add_row(printable(row["network"]), *(f"{row[column]:.1f}" for column in report["columns"]))
    return out
