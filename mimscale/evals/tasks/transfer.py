"""Several data sets, one table: the protocols of the runner on each, with the metric that the set's papers report.

Source of the table: AMT (Liu et al., AAAI 2023, arXiv 2211.15362: CIFAR-10/100, STL-10, Tiny ImageNet, ImageNet-1K) and
the fixed-feature table of Kornblith et al. (CVPR 2019, arXiv 1805.08974), whose metrics these are: mean per-class
accuracy for Pets, Flowers and Aircraft, top-1 for the others. `data_prep torchvision` stores it in the manifest.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rich.table import Table

from mimscale.data.manifest import Manifest
from mimscale.data.storage import is_remote
from mimscale.distributed.coordination import Coordinator
from mimscale.errors import UserError, printable
from mimscale.evals.launch import add_shared, check_out, default_out, on_ranks, publish
from mimscale.evals.options import config_of
from mimscale.evals.runner import Settings, evaluate, protocol_class

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


def run(args: argparse.Namespace) -> int:
    check_out(args)
    pairs = [pair_of(text) for text in args.sets]
    names = [pair.name for pair in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--sets {twice}: the name is given twice; each data set has one")
    protocols = list(dict.fromkeys(args.protocols))
    for name in protocols:
        if not {"pooled", "labels"} <= protocol_class(name).needs:
            raise UserError(f"--protocols {name}: it needs no pooled features and labels; take knn or linear")
    report = on_ranks(args, lambda settings, ranks: transfer(protocols, args.runs, pairs, settings, ranks))
    outs = [default_out(path, ["transfer", *names, *protocols], args) for path in args.runs]
    if report is not None:
        publish(report, tables(report), [args.out] if args.out else outs)
    return 0


def pair_of(text: str) -> Pair:
    """`NAME=FOLDER` or `NAME=TRAIN:VAL`; a path may be a URL. Raises UserError."""
    name, _, rest = text.partition("=")
    parts = rest.replace("://", "\0").split(":")
    train, *val = (part.replace("\0", "://") for part in parts)
    if not name or not train or len(val) > 1 or (val and not val[0]):
        raise UserError(f"--sets {text} is not NAME=FOLDER or NAME=TRAIN:VAL, such as cifar10=shards/cifar10")
    if val:
        return Pair(name, Path(train), Path(val[0]))
    if not is_remote(train) and not (Path(train) / "train").is_dir():
        raise UserError(f"--sets {text}: {train} has no folder train; give NAME=TRAIN:VAL, or make it with data_prep")
    return Pair(name, Path(train) / "train", Path(train) / "val")


def transfer(
    protocols: Sequence[str], runs: Sequence[Path], pairs: Sequence[Pair], settings: Settings, ranks: Coordinator
) -> dict[str, Any]:
    """The report: a row for each protocol, network and pooling with the value of each data set and their mean.

    parts: the runner's report of each protocol on each set. Every set is opened before an image is read. Raises
    UserError.
    """
    metrics = ranks.on_all_ranks(lambda: {pair.name: metric_of(pair) for pair in pairs})
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
    table = [
        {"protocol": name, "network": network, "pool": pool, **row, "mean": fmean(row["values"].values())}
        for (name, network, pool), row in rows.items()
    ]
    return {
        "protocol": {"name": "transfer", "protocols": list(protocols)},
        "headings": headings,
        "sets": metrics,
        "rows": sorted(table, key=lambda row: list(protocols).index(row["protocol"])),
        "parts": parts,
    }


def metric_of(pair: Pair) -> str:
    """The metric that the manifest of the validation set names; top-1 where it names none. Raises UserError."""
    return str(Manifest.load(pair.val).file.source.get("metric", "top-1"))


def value_of(row: Mapping[str, Any], key: str, metric: str, protocol: str) -> float:
    """Percent. Raises UserError for a protocol that does not report the set's metric."""
    wanted = key + SUFFIX if metric == PER_CLASS else key
    if wanted not in row:
        raise UserError(
            f"--protocols {protocol} reports no {metric} accuracy, the metric of one of --sets; leave it out"
        )
    return float(row[wanted])


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
