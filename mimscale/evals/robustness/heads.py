"""The classifiers of a table: each run's own head, or a logistic regression that is fitted to frozen features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimscale.data.manifest import Manifest
from mimscale.distributed.coordination import Coordinator
from mimscale.errors import UserError
from mimscale.evals.classifier import load_classifier
from mimscale.evals.extraction import features_of
from mimscale.evals.logistic_regression import standardised
from mimscale.evals.networks import Network, features_folder, load_networks
from mimscale.evals.protocols.linear import full_data
from mimscale.evals.robustness.classifiers import Classifier, class_names, digest, linear_logits
from mimscale.evals.runner import Settings, extraction_of

FROZEN_CROP = 0.875  # as the runner's default
Check = Callable[[list[str]], None]
"""Raises UserError where a classifier with outputs of these names cannot answer for the data sets."""


def classifiers_of(
    runs: Sequence[Path],
    settings: Settings,
    ranks: Coordinator,
    train: Path | None,
    classes_of: Path | None,
    check: Check,
) -> list[Classifier]:
    """train: fit heads to its features; None: the runs have heads of their own. Raises UserError, on all ranks.

    A crop_pct of 0 in the settings is that of each run, 0.875 for frozen features.
    """
    paths = list(dict.fromkeys(runs))
    if train is None:
        return ranks.on_all_ranks(lambda: [_own(path, paths, settings, classes_of, check) for path in paths])
    settings = replace(settings, crop_pct=settings.crop_pct or FROZEN_CROP)
    manifest, networks = ranks.on_all_ranks(lambda: _frozen(paths, settings, train, check))
    found = []
    for size in sorted({network.image_size for network in networks}):
        group = [network for network in networks if network.image_size == size]
        features = features_of(group, manifest, "train", extraction_of(settings), ranks)
        by_name = {network.name: network for network in group}
        for (name, pool), values in features.items():
            found.append(_fitted(by_name[name], pool, values, manifest, settings, ranks))
    return found


def _own(path: Path, paths: Sequence[Path], settings: Settings, classes_of: Path | None, check: Check) -> Classifier:
    found = load_classifier(
        path,
        image_size=settings.image_size,
        device=settings.device,
        precision=settings.precision,
        ema=settings.ema,
    )
    names = class_names(found.run, classes_of)
    check(names)
    data = found.run.data
    about = {"source": str(found.path), "step": found.step, "sha256": found.sha256, "head": "own"}
    identity = {"classifier": found.sha256, "ema": settings.ema}
    name = path.name if [one.name for one in paths].count(path.name) == 1 else str(path)
    name += " (ema)" if settings.ema else ""
    crop_pct = settings.crop_pct or data.eval_crop_pct
    return Classifier(name, data.image_size, crop_pct, found.logits, names, identity, features_folder(path), about)


def _frozen(paths: Sequence[Path], settings: Settings, train: Path, check: Check) -> tuple[Manifest, list[Network]]:
    manifest = Manifest.load(train)
    if manifest.labels is None or manifest.labels.min() < 0 or manifest.classes is None:
        raise UserError(f"--train {train} has samples without labels; prepare it without --unlabelled")
    check(manifest.classes)
    networks = load_networks(
        paths,
        pools=settings.pools,
        image_size=settings.image_size,
        seed=settings.seed,
        device=settings.device,
        precision=settings.precision,
        ema=settings.ema,
        baselines=settings.baselines,
    )
    return manifest, networks


def _fitted(
    network: Network, pool: str, features: Tensor, manifest: Manifest, settings: Settings, ranks: Coordinator
) -> Classifier:
    """Every rank fits; all take rank 0's numbers, so that their predictions are those of one head."""
    labels = torch.from_numpy(np.array(manifest.labels))
    classes = manifest.classes or []
    deviation, mean = torch.std_mean(features, dim=0, correction=0)
    deviation = deviation.clamp_min(1e-6)
    x = standardised(features, features[:1])[0]
    search = full_data(x, labels, len(classes), seed=settings.seed, device=settings.device)
    weight, bias = ranks.broadcast((search.classifier.weight.cpu(), search.classifier.bias.cpu()))
    head = search.classifier._replace(weight=weight.to(settings.device), bias=bias.to(settings.device))
    logits = linear_logits(lambda images: network.extract(images)[pool], mean, deviation, head)
    about: dict[str, Any] = {
        **network.about,
        "head": "logistic regression",
        "pool": pool,
        "l2": search.l2,
        "converged": head.converged,
        "train": {"shards": manifest.location, "samples": manifest.samples, "fingerprint": manifest.fingerprint},
    }
    identity = {**network.identity, "pool": pool, "head": digest(weight, bias, mean, deviation)}
    name = f"{network.name}, {pool}"
    return Classifier(name, network.image_size, settings.crop_pct, logits, classes, identity, network.folder, about)
