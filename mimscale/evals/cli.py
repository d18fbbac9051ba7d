"""mimscale evaluate: accuracy of frozen features, always beside raw pixels and the same network at random."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mimscale.checkpoint import format as checkpoint
from mimscale.data.manifest import Manifest
from mimscale.errors import UserError
from mimscale.evals import linear
from mimscale.evals.features import Extractor, stream
from mimscale.evals.knn import TEMPERATURE, K, Neighbours
from mimscale.evals.metrics import top1
from mimscale.evals.networks import load_networks
from mimscale.evals.report import table, write

PACKAGES = ("mimscale", "torch", "torchmetrics", "scikit-learn", "numpy", "pillow")
Key = tuple[str, str]  # network, pool
Scores = dict[str, Any]
T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    protocols = parser.add_subparsers(dest="protocol", required=True, metavar="PROTOCOL")
    knn = protocols.add_parser("knn", help="weighted k nearest neighbours: no training, no choice to make")
    _add_common(knn)
    knn.add_argument("--k", type=_at_least(1), default=K, help=f"neighbours (default {K})")
    knn.add_argument("--temperature", type=float, default=TEMPERATURE, help=f"of their votes (default {TEMPERATURE})")
    probe = protocols.add_parser("linear", help="logistic regression on all labels, and on a few per class")
    _add_common(probe)
    probe.add_argument("--shots", type=_at_least(1), metavar="N", help="also with N labels per class")
    probe.add_argument("--draws", type=_at_least(1), default=3, metavar="N", help="choices of those labels (default 3)")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, checkpoint folder or file")
    parser.add_argument("--train", type=Path, required=True, metavar="SHARDS", help="labelled data set to learn from")
    parser.add_argument("--val", type=Path, required=True, metavar="SHARDS", help="labelled data set to be tested on")
    parser.add_argument(
        "--pool", nargs="+", choices=("mean", "cls"), default=["mean"], help="patch mean, class token (default mean)"
    )
    parser.add_argument("--image-size", type=_at_least(1), metavar="PX", help="default: as the run was trained")
    parser.add_argument("--crop-pct", type=float, default=0.875, help="share of the short side seen (default 0.875)")
    parser.add_argument("--batch", type=_at_least(1), default=256, help="images at a time (default 256)")
    parser.add_argument("--workers", type=_at_least(0), default=8, help="processes that read images (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="of random networks, hold-out and few-shot draws")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="of the networks (default bf16 on cuda)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: eval/ in the folder of each run")


def run(args: argparse.Namespace) -> int:
    train, val = _data(args.train, args.val)
    assert train.labels is not None and val.labels is not None
    classes = int(max(train.labels.max(), val.labels.max())) + 1
    if args.protocol == "knn" and args.k > train.samples:
        raise UserError(f"--k {args.k} is more than the {train.samples} training samples of {args.train}; lower it")
    if args.protocol == "knn" and not args.temperature > 0:
        raise UserError(f"--temperature {args.temperature:g} must be above 0; {TEMPERATURE} is usual")
    if args.out is not None and args.out.suffix != ".json":
        raise UserError(f"--out {args.out} must end in .json")
    args.device = _device(args.device)
    args.precision = args.precision or ("bf16" if args.device.type == "cuda" else "fp32")
    protocol = _knn if args.protocol == "knn" else _linear
    networks = load_networks(
        list(dict.fromkeys(args.runs)),
        pools=args.pool,
        image_size=args.image_size,
        seed=args.seed,
        device=args.device,
        precision=args.precision,
    )
    scores: dict[Key, Scores] = {}
    for size in sorted({network.image_size for network in networks}):
        look = Look({n.name: n.extract for n in networks if n.image_size == size}, size, args)
        scores |= protocol(look, train, val, classes, args)
    rows = [
        {"network": network.name, "pool": pool, **network.about, **result}
        for network in networks
        for (name, pool), result in scores.items()
        if name == network.name
    ]
    report = {
        "protocol": _protocol(args),
        "unit": "percent top-1",
        "train": _identity(args.train, train),
        "val": _identity(args.val, val),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "rows": rows,
    }
    outs = [args.out] if args.out else list(dict.fromkeys(_default_out(path, args) for path in args.runs))
    for out in outs:
        write(report, out)
    console = Console()
    console.print(table(report))
    for out in outs:
        console.print(f"wrote {out}", soft_wrap=True, highlight=False)
    return 0


# ------------------------------------------------------------------------------------------------ protocols


@dataclass(frozen=True)
class Look:
    """All networks of one image size: what they see of a data set, in one pass over it."""

    extractors: Mapping[str, Extractor]
    image_size: int
    args: argparse.Namespace

    def batches(self, manifest: Manifest, what: str) -> Iterable[tuple[dict[Key, Tensor], Tensor]]:
        a = self.args
        batches = stream(
            self.extractors,
            manifest,
            self.image_size,
            batch=a.batch,
            workers=a.workers,
            crop_pct=a.crop_pct,
            device=a.device,
        )
        return _progress(batches, -(-manifest.samples // a.batch), what)

    def whole(self, manifest: Manifest, what: str) -> tuple[dict[Key, Tensor], Tensor]:
        """All features in host memory, float32: samples x D x 4 bytes for each network and pool."""
        pieces: dict[Key, list[Tensor]] = {}
        labels = []
        for features, of_batch in self.batches(manifest, what):
            for key, piece in features.items():
                pieces.setdefault(key, []).append(piece.cpu())
            labels.append(of_batch.cpu())
        return {key: torch.cat(parts) for key, parts in pieces.items()}, torch.cat(labels)


def _knn(look: Look, train: Manifest, val: Manifest, classes: int, args: argparse.Namespace) -> dict[Key, Scores]:
    queries, truth = look.whole(val, "val")
    neighbours = {key: Neighbours(features, args.k) for key, features in queries.items()}
    for features, labels in look.batches(train, "train"):
        for key, piece in features.items():
            neighbours[key].add(piece, labels)
    votes = {key: found.votes(classes, args.temperature) for key, found in neighbours.items()}
    return {key: {"knn": top1(vote.argmax(dim=1), truth, classes)} for key, vote in votes.items()}


def _linear(look: Look, train: Manifest, val: Manifest, classes: int, args: argparse.Namespace) -> dict[Key, Scores]:
    known, labels = look.whole(train, "train")
    unknown, truth = look.whole(val, "val")
    scores: dict[Key, Scores] = {}
    for key in _progress(list(known), len(known), "fit"):
        x, x_val = linear.standardised(known.pop(key), unknown.pop(key))
        classifier, l2 = linear.full_data(x, labels, classes, seed=args.seed, device=args.device)
        scores[key] = {"linear": top1(linear.predict(classifier, x_val), truth, classes), "l2": l2}
        if args.shots:
            draws = []
            for draw in range(args.draws):
                ids = linear.few_shot_ids(labels.numpy(), args.shots, args.seed, draw)
                few = linear.few_shot(x[ids], labels[ids])
                draws.append(top1(torch.from_numpy(few.predict(x_val.double().numpy())), truth, classes))
            spread = statistics.stdev(draws) if len(draws) > 1 else 0.0
            scores[key] |= {"few_shot": statistics.fmean(draws), "few_shot_sd": spread, "few_shot_draws": draws}
    return scores


def _progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """A bar for a person who watches, nothing in a file."""
    console = Console(stderr=True)
    if console.is_terminal:
        items = track(items, what, total, console=console, transient=True)
    yield from items


# ------------------------------------------------------------------------------------------------ in and out


def _data(train_path: Path, val_path: Path) -> tuple[Manifest, Manifest]:
    train, val = Manifest.load(train_path), Manifest.load(val_path)
    for flag, path, manifest in (("--train", train_path, train), ("--val", val_path, val)):
        if manifest.labels is None or manifest.labels.min() < 0:
            raise UserError(f"{flag} {path} has samples without labels; prepare it without --unlabelled")
    if train.classes != val.classes:
        differ = sorted(set(train.classes or ()) ^ set(val.classes or ()))
        what = f"'{differ[0]}' is in one of them only" if differ else "their order differs"
        raise UserError(f"--train {train_path} and --val {val_path} have different classes: {what}")
    if train.fingerprint == val.fingerprint:
        raise UserError(f"--val {val_path} is the training set itself; give data that --train does not hold")
    return train, val


def _protocol(args: argparse.Namespace) -> dict[str, Any]:
    common = {
        "name": args.protocol,
        "pool": args.pool,
        "crop_pct": args.crop_pct,
        "seed": args.seed,
        "precision": args.precision,
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else "cpu",
    }
    if args.protocol == "knn":
        return {**common, "k": args.k, "temperature": args.temperature, "similarity": "cosine"}
    return {**common, "shots": args.shots, "draws": args.draws if args.shots else None, "l2_grid": linear.L2_GRID}


def _identity(path: Path, manifest: Manifest) -> dict[str, Any]:
    return {"shards": str(path), "samples": manifest.samples, "fingerprint": manifest.fingerprint}


def _default_out(path: Path, args: argparse.Namespace) -> Path:
    """RUN/eval/PROTOCOL-POOL-CHECKPOINT.json."""
    if (path / "config.yaml").is_file():
        folder, of = path, checkpoint.newest(path) or path
    else:
        folder, of = (path.parent.parent, path) if path.is_dir() else (path.parent, path)
    shots = f"-{args.shots}shot" if getattr(args, "shots", None) else ""
    return folder / "eval" / f"{args.protocol}{shots}-{'-'.join(args.pool)}-{of.stem}.json"


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
