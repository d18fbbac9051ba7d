"""Several data sets, one table: the protocols of the runner on each, with the metric that the set's papers report.

Source of the table: AMT (Liu et al., AAAI 2023, arXiv 2211.15362: CIFAR-10/100, STL-10, Tiny ImageNet, ImageNet-1K) and
the fixed-feature table of Kornblith et al. (CVPR 2019, arXiv 1805.08974), whose metrics these are: mean per-class
accuracy for Pets, Flowers and Aircraft, top-1 for the others. `data_prep torchvision` stores it in the manifest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table

from mimscale.data.manifest import Manifest
from mimscale.data.storage import is_remote
from mimscale.distributed.coordination import Coordinator
from mimscale.errors import UserError, printable
from mimscale.evals.launch import add_shared, check_out, default_outs, on_ranks, publish
from mimscale.evals.metrics import mean_per_class, top1
from mimscale.evals.options import config_of
from mimscale.evals.protocols.base import Protocol
from mimscale.evals.robustness.classifiers import Classifier
from mimscale.evals.robustness.heads import own_classifier, predictions_of
from mimscale.evals.runner import Settings, evaluate, open_data, protocol_class
from mimscale.files.command_line import end_with_example

SUMMARY = "protocols on several data sets: one table, with its mean"
PER_CLASS = "mean per-class"  # the metric in a manifest's source; any other is top-1
SUFFIX = "_per_class"  # of the key of a protocol's result


class Pair(NamedTuple):
    """One data set: to learn from, to be measured on."""

    name: str
    train: Path
    val: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, pooled=True)
    where = "shards of each data set: FOLDER holds train and val, as data_prep torchvision writes them"
    parser.add_argument("--sets", nargs="+", required=True, metavar="NAME=FOLDER", help=f"{where}; or NAME=TRAIN:VAL")
    parser.add_argument(
        "--protocols", nargs="+", default=["knn", "linear"], metavar="PROTOCOL", help="(default knn linear)"
    )
    text = "a run of finetune or linear_mae that was trained on the set, measured with its own head"
    parser.add_argument("--classifiers", nargs="+", default=[], metavar="NAME=RUN", help=text)
    end_with_example(parser, "mimscale evaluate transfer runs/l16 --sets pets=shards/pets cars=shards/cars")


def run(args: argparse.Namespace) -> int:
    check_out(args)
    pairs = [pair_of(text) for text in args.sets]
    names = [pair.name for pair in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--sets {twice}: the name is given twice; each data set has one")
    protocols = list(dict.fromkeys(args.protocols))
    for name in protocols:
        if "labels" not in protocol_class(name).needs:
            raise UserError(f"--protocols {name}: it takes no labels, so it has no accuracy; take knn or linear")
    heads = heads_of(args.classifiers, names)
    report = on_ranks(args, lambda settings, ranks: transfer(protocols, args.runs, pairs, settings, ranks, heads))
    if report is not None:
        prints = [part[split]["fingerprint"] for part in report["parts"] for split in ("train", "val")]
        outs = default_outs(args, report_words(names, protocols, heads), report["protocol"]["precision"], prints)
        publish(report, tables(report), outs, args.json, report["departs"])
    return 0


def report_words(names: Sequence[str], protocols: Sequence[str], heads: Sequence[tuple[str, Path]]) -> list[str]:
    """Of the report's name: what was measured. Runs with heads of their own stand there as a hash of their paths."""
    words = ["transfer", *names, *protocols]
    if heads:
        text = json.dumps(sorted((name, str(path.resolve())) for name, path in heads))
        words.append("heads" + hashlib.sha256(text.encode()).hexdigest()[:8])
    return words


def pair_of(text: str) -> Pair:
    """`NAME=FOLDER` or `NAME=TRAIN:VAL`; a path may be a URL. Raises UserError."""
    name, _, rest = text.partition("=")
    parts = rest.replace("://", "\0").split(":")
    train, *val = (part.replace("\0", "://") for part in parts)
    if not name or not train or len(val) > 1 or (val and not val[0]):
        raise UserError(f"--sets {text} is not NAME=FOLDER or NAME=TRAIN:VAL, such as cifar10=shards/cifar10")
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(f"--sets {name}: the name of a data set is made of letters, digits and . _ + -; rename it")
    if val:
        return Pair(name, Path(train), Path(val[0]))
    if not is_remote(train) and not (Path(train) / "train").is_dir():
        raise UserError(f"--sets {text}: {train} has no folder train; give NAME=TRAIN:VAL, or make it with data_prep")
    return Pair(name, Path(train) / "train", Path(train) / "val")


def transfer(
    protocols: Sequence[str],
    runs: Sequence[Path],
    pairs: Sequence[Pair],
    settings: Settings,
    ranks: Coordinator,
    heads: Sequence[tuple[str, Path]] = (),
) -> dict[str, Any]:
    """The report: a row for each protocol, network and pooling with the value of each data set and their mean.

    heads: (name of a set, run that was trained on it): a row for each method. parts: the runner's report of each
    protocol on each set. Every set and head is opened before an image is read. Raises UserError.
    """
    metrics = ranks.on_all_ranks(lambda: {pair.name: checked(pair, protocols) for pair in pairs})
    of_heads = ranks.on_all_ranks(lambda: _classifiers(heads, pairs, settings))
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    headings: dict[str, str] = {}
    parts = []
    for pair in pairs:
        for name in protocols:
            kind = protocol_class(name)
            part = evaluate(name, config_of({}, kind.Config), runs, pair.train, pair.val, settings, ranks)
            parts.append({"set": pair.name, **part})
            key = next(iter(part["metrics"]))
            headings[name] = part["metrics"][key]
            for row in part["rows"]:
                own = rows.setdefault((name, row["network"], row["pool"]), {"values": {}})
                own["values"][pair.name] = value_of(row, key, metrics[pair.name], name)
    for method, of_sets in of_heads.items():
        headings[method] = f"{method}, own heads"
        own = rows.setdefault((method, "own heads", ""), {"values": {}, "sources": {}})
        for pair in pairs:
            found = of_sets[pair.name]
            own["values"][pair.name] = _accuracy(found, pair, metrics[pair.name], settings, ranks)
            own["sources"][pair.name] = found.about
    table = [
        {"protocol": name, "network": network, "pool": pool, **row, "mean": fmean(row["values"].values())}
        for (name, network, pool), row in rows.items()
    ]
    return {
        "protocol": {
            "name": "transfer",
            "protocols": list(protocols),
            **{key: parts[0]["protocol"][key] for key in ("seed", "crop_pct", "precision", "device", "ema")},
        },
        "commit": parts[0]["commit"],
        "ranks": ranks.world,
        "seconds": {key: sum(part["seconds"][key] for part in parts) for key in ("features", "fit")},
        "departs": list(dict.fromkeys(f"{p['protocol']['name']}: {line}" for p in parts for line in p["departs"])),
        "headings": headings,
        "sets": metrics,
        "rows": sorted(table, key=lambda row: list(headings).index(row["protocol"])),
        "parts": parts,
    }


def checked(pair: Pair, protocols: Sequence[str]) -> str:
    """The metric that the manifest of the validation set names; top-1 where it names none. Raises UserError for a data
    set that does not do for one of the protocols.
    """
    train, val = open_data(pair.train, pair.val, labelled=True)
    metric = str(val.file.source.get("metric", "top-1"))
    for name in protocols:
        kind = protocol_class(name)
        if metric == PER_CLASS and kind.unit != Protocol.unit:
            raise UserError(
                f"--protocols {name} reports {kind.unit}, and --sets {pair.name} asks for {metric} accuracy; leave one "
                f"of them out"
            )
        kind.check(config_of({}, kind.Config), train, val)
    return metric


def value_of(row: Mapping[str, Any], key: str, metric: str, protocol: str) -> float:
    """Percent. Raises UserError for a protocol that does not report the set's metric."""
    wanted = key + SUFFIX if metric == PER_CLASS else key
    if wanted not in row:
        raise UserError(
            f"--protocols {protocol} reports no {metric} accuracy, the metric of one of --sets; leave it out"
        )
    return float(row[wanted])


def heads_of(texts: Sequence[str], names: Sequence[str]) -> list[tuple[str, Path]]:
    """(name of a set, run) of each `NAME=RUN`. Raises UserError."""
    found = []
    for text in texts:
        name, _, path = text.partition("=")
        if name not in names or not path:
            raise UserError(f"--classifiers {text} is not NAME=RUN with a NAME of --sets ({', '.join(names)})")
        found.append((name, Path(path)))
    return found


def _classifiers(
    heads: Sequence[tuple[str, Path]], pairs: Sequence[Pair], settings: Settings
) -> dict[str, dict[str, Classifier]]:
    """Method -> set -> its classifier, at its own image size and crop. Raises UserError."""
    found: dict[str, dict[str, Classifier]] = {}
    own_sizes = replace(settings, image_size=None, crop_pct=0.0)
    of_pair = {pair.name: pair for pair in pairs}
    for name, path in heads:
        one = own_classifier(path, [path for _, path in heads], own_sizes, of_pair[name].train, lambda names: None)
        of_sets = found.setdefault(one.about["method"], {})
        if name in of_sets:
            raise UserError(f"--classifiers {name}: two runs of {one.about['method']}; give one")
        of_sets[name] = one
    for method, of_sets in found.items():
        missing = [pair.name for pair in pairs if pair.name not in of_sets]
        if missing:
            raise UserError(f"--classifiers: no run of {method} for {', '.join(missing)}; give one for each of --sets")
    return found


def _accuracy(found: Classifier, pair: Pair, metric: str, settings: Settings, ranks: Coordinator) -> float:
    val = ranks.on_all_ranks(Manifest.load, pair.val)
    labels = torch.from_numpy(np.array(val.labels))
    of = mean_per_class if metric == PER_CLASS else top1
    return of(predictions_of(found, val, pair.name, settings, ranks), labels, len(found.classes))


def tables(report: Mapping[str, Any]) -> list[Table]:
    """One per protocol: a column per data set, and the mean over them."""
    found = []
    for name, heading in report["headings"].items():
        out = Table(title=f"{heading}, percent; * mean per-class, others top-1")
        for column in ("network", "pool"):
            out.add_column(column)
        for column, metric in report["sets"].items():
            out.add_column(printable(column) + (" *" if metric == PER_CLASS else ""), justify="right")
        out.add_column("mean", justify="right")
        for row in report["rows"]:
            if row["protocol"] == name:
                values = [f"{row['values'][column]:.1f}" for column in report["sets"]]
                out.add_row(printable(row["network"]), row["pool"], *values, f"{row['mean']:.1f}")
        found.append(out)
    return found
