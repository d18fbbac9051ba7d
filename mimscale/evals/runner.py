"""Runs one protocol on the features of some networks: reads images once, measures each network, gathers a report.

Every rank of a launch calls `evaluate`. They share the images and the protocol's work, and all return one report.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimscale.checkpoint.run_folder import git_commit
from mimscale.config.base import Strict
from mimscale.config.registry import class_in, names_in
from mimscale.data.manifest import Manifest
from mimscale.distributed.coordination import Coordinator
from mimscale.errors import UserError, warn
from mimscale.evals.extraction import Extraction, features_of
from mimscale.evals.features import Key, Pooling
from mimscale.evals.networks import Network, load_networks
from mimscale.evals.options import changed
from mimscale.evals.overlap import check_apart
from mimscale.evals.protocols.base import Context, Features, Protocol, Results
from mimscale.files.progress import tracked, working

PROTOCOLS = "mimscale.evals.protocols"
PACKAGES = ("mimscale", "torch", "torchmetrics", "scikit-learn", "scipy", "numpy", "pillow")


@dataclass(frozen=True)
class Settings:
    """What holds for every protocol.

    pools: for protocols that need "pooled". image_size: None for that of each run. crop_pct: share of the short side
    that the centre crop keeps. seed: of random networks and of what a protocol draws. precision: of the networks, fp32
    or bf16. ema: measure the moving average of each student. baselines: measure raw pixels and random networks, too.
    cache: keep features on disk, in `folder` or with each run.
    """

    device: torch.device
    precision: str
    pools: tuple[Pooling, ...] = ("mean",)
    image_size: int | None = None
    crop_pct: float = 0.875
    batch: int = 256
    workers: int = 8
    seed: int = 0
    ema: bool = False
    baselines: bool = False
    cache: bool = True
    folder: Path | None = None


def protocol_names() -> list[str]:
    return names_in(PROTOCOLS)


def protocol_class(name: str) -> type[Protocol]:
    """Raises UserError for a name that no file has."""
    try:
        found: type[Protocol] = class_in(PROTOCOLS, name, "protocol")
    except ValueError as error:
        raise UserError(str(error)) from None
    return found


def evaluate(
    name: str,
    config: Strict,
    runs: Sequence[Path],
    train_path: Path,
    val_path: Path,
    settings: Settings,
    ranks: Coordinator | None = None,
) -> dict[str, Any]:
    """The report: what was measured, how, on which data, and a row for each network and pooling.

    name: of the protocol; config: of its Config. runs: run folders, checkpoint folders or files. ranks: of this launch,
    None for one process. Warnings of the protocol are printed, too. Raises UserError, on all ranks.
    """
    kind, ranks, start_s = protocol_class(name), ranks or Coordinator(), time.monotonic()
    pools: tuple[Pooling, ...] = settings.pools
    if "pooled" not in kind.needs:
        pools = ("blocks",) if "blocks" in kind.needs else ("tokens",)

    def prepare() -> tuple[Manifest, Manifest, list[Network]]:
        train, val = open_data(train_path, val_path, labelled="labels" in kind.needs)
        kind.check(config, train, val)
        return train, val, networks_of(runs, pools, settings, kind.blocks)

    train, val, networks = ranks.on_all_ranks(prepare)
    ranks.on_rank0(check_apart, train_path, train, val_path, val)
    results: dict[Key, Results] = {}
    seconds = {"features": 0.0, "fit": 0.0}
    for size in sorted({network.image_size for network in networks}):
        group = [network for network in networks if network.image_size == size]
        results |= _run(kind, config, group, train, val, settings, ranks, seconds)
    rows = [
        {"network": network.name, "pool": pool, **network.about, **result}
        for network in networks
        for (name_of, pool), result in results.items()
        if name_of == network.name
    ]
    for row in rows:
        for line in row.setdefault("warnings", []) if ranks.rank == 0 else ():
            warn(f"mimscale evaluate: warning: {row['network']}, {row['pool']}: {line}")
    return {
        "protocol": {
            "name": name,
            "pool": list(pools),
            "image_size": sorted({network.image_size for network in networks}),
            "crop_pct": settings.crop_pct,
            "seed": settings.seed,
            "precision": settings.precision,
            "device": torch.cuda.get_device_name() if settings.device.type == "cuda" else "cpu",
            "ema": settings.ema,
            **config.model_dump(mode="json"),
            **kind.constants,
        },
        "changed": changed(config, "json"),
        "departs": list(kind.departs),
        "unit": kind.unit,
        "metrics": kind.headings(config),
        "train": identity(train_path, train),
        "val": identity(val_path, val),
        "seconds": {"total": round(time.monotonic() - start_s, 1), **{key: round(s, 1) for key, s in seconds.items()}},
        "ranks": ranks.world,
        "commit": git_commit(),
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "rows": rows,
    }


def _run(
    kind: type[Protocol],
    config: Strict,
    networks: Sequence[Network],
    train: Manifest,
    val: Manifest,
    settings: Settings,
    ranks: Coordinator,
    seconds: dict[str, float],
) -> dict[Key, Results]:
    """Results of networks that take images of one size: one pass over each data set for all of them.

    seconds: to which the time of reading or computing features, and that of the protocol, is added.
    """
    start_s = time.monotonic()
    how = extraction_of(settings)
    of_val = features_of(networks, val, "val", how, ranks)
    of_train = features_of(networks, train, "train", how, ranks)
    fit_s = time.monotonic()
    seconds["features"] += fit_s - start_s
    context = Context(_classes(train, val), settings.seed, settings.device, ranks.rank, ranks.world, train, val)

    def fit(key: Key) -> Results:
        protocol = kind(config, context)
        return protocol.run(Features(of_train[key], _labels(train)), Features(of_val[key], _labels(val)))

    keys = list(of_train)
    if ranks.rank:
        found = {key: fit(key) for key in keys}
    elif len(keys) > 1:
        found = {key: fit(key) for key in tracked(keys, len(keys), kind.__name__, "fits")}
    else:
        with working(kind.__name__):
            found = {key: fit(key) for key in keys}
    seconds["fit"] += time.monotonic() - fit_s
    return found


def networks_of(runs: Sequence[Path], pools: tuple[Pooling, ...], settings: Settings, blocks: int = 1) -> list[Network]:
    """The rows of a table, each run once; see `load_networks`. Raises UserError."""
    return load_networks(
        list(dict.fromkeys(runs)),
        pools=pools,
        image_size=settings.image_size,
        seed=settings.seed,
        device=settings.device,
        precision=settings.precision,
        ema=settings.ema,
        blocks=blocks,
        baselines=settings.baselines,
    )


def extraction_of(settings: Settings) -> Extraction:
    return Extraction(
        settings.device,
        settings.precision,
        settings.crop_pct,
        settings.batch,
        settings.workers,
        settings.cache,
        settings.folder,
    )


def _labels(manifest: Manifest) -> Tensor:
    if manifest.labels is None:
        return torch.full((manifest.samples,), -1)
    return torch.from_numpy(np.array(manifest.labels))


def open_data(train_path: Path, val_path: Path, labelled: bool) -> tuple[Manifest, Manifest]:
    """The two data sets of an evaluation. Raises UserError where they do not go together."""
    train, val = Manifest.load(train_path), Manifest.load(val_path)
    for flag, path, manifest in (("--train", train_path, train), ("--val", val_path, val)):
        if labelled and (manifest.labels is None or manifest.labels.min() < 0):
            raise UserError(f"{flag} {path} has samples without labels; prepare it without --unlabelled")
    if labelled and train.classes != val.classes:
        differ = sorted(set(train.classes or ()) ^ set(val.classes or ()))
        what = f"'{differ[0]}' is in one of them only" if differ else "their order differs"
        raise UserError(f"--train {train_path} and --val {val_path} have different classes: {what}")
    if labelled:
        assert train.labels is not None and val.labels is not None
        check_several_classes(train.labels, f"--train {train_path}")
        highest = int(val.labels.max())
        if train.classes is None and highest > train.labels.max():
            raise UserError(
                f"--train {train_path} and --val {val_path} have different classes: no {highest} in --train"
            )
    return train, val


def check_several_classes(labels: NDArray[np.integer[Any]], given: str) -> None:
    """given: what has these labels, in words. Raises UserError."""
    if labels.min() == labels.max():
        raise UserError(f"{given} has images of one class only; give a set of at least two classes")


def _classes(*manifests: Manifest) -> int:
    """The largest label of all plus one; 0 without labels."""
    return 1 + max(int(m.labels.max()) if m.labels is not None else -1 for m in manifests)


def identity(path: Path, manifest: Manifest) -> dict[str, Any]:
    """What a report says of a data set."""
    return {"shards": str(path), "samples": manifest.samples, "fingerprint": manifest.fingerprint}
