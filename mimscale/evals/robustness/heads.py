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
from mimscale.evals.launch import CROP_PCT
from mimscale.evals.logistic_regression import Rows
from mimscale.evals.networks import Network, features_folder
from mimscale.evals.protocols.linear import HOLD_OUT, full_data, hold_out
from mimscale.evals.robustness.classes import outputs_of
from mimscale.evals.robustness.classifiers import PREDICTION, Classifier, class_names, digest, linear_logits
from mimscale.evals.runner import Settings, check_several_classes, extraction_of, networks_of

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

    A crop_pct of 0 in the settings is that of each run, the runner's default for frozen features.
    """
    paths = list(dict.fromkeys(runs))
    if train is None:
        return ranks.on_all_ranks(lambda: [own_classifier(path, paths, settings, classes_of, check) for path in paths])
    settings = replace(settings, crop_pct=settings.crop_pct or CROP_PCT)
    manifest, networks = ranks.on_all_ranks(lambda: _frozen(paths, settings, train, check))
    found = []
    for size in sorted({network.image_size for network in networks}):
        group = [network for network in networks if network.image_size == size]
        features = features_of(group, manifest, "train", extraction_of(settings), ranks)
        by_name = {network.name: network for network in group}
        for (name, pool), values in features.items():
            found.append(_fitted(by_name[name], pool, values, manifest, settings, ranks))
    return found


def own_classifier(
    path: Path, paths: Sequence[Path], settings: Settings, classes_of: Path | None, check: Check
) -> Classifier:
    """A run with a head of its own. paths: all of the table, whose names are to differ. Raises UserError."""
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
    about = {"source": str(found.path), "step": found.step, "sha256": found.sha256}
    about |= {"method": found.run.method.name, "head": "own"}
    about["trained_on"] = found.run.data.shards if isinstance(found.run.data.shards, str) else None
    identity = {"classifier": found.sha256, "ema": settings.ema}
    name = path.name if [one.name for one in paths].count(path.name) == 1 else str(path)
    name += " (ema)" if settings.ema else ""
    crop_pct = settings.crop_pct or data.eval_crop_pct
    return Classifier(name, data.image_size, crop_pct, found.logits, names, identity, features_folder(path), about)


def _frozen(paths: Sequence[Path], settings: Settings, train: Path, check: Check) -> tuple[Manifest, list[Network]]:
    manifest = Manifest.load(train)
    if manifest.labels is None or manifest.labels.min() < 0 or manifest.classes is None:
        raise UserError(f"--train {train} has samples without labels; prepare it without --unlabelled")
    check_several_classes(manifest.labels, f"--train {train}")
    check(manifest.classes)
    return manifest, networks_of(paths, settings.pools, settings)


def _fitted(
    network: Network, pool: str, features: Tensor, manifest: Manifest, settings: Settings, ranks: Coordinator
) -> Classifier:
    """The ranks share the fit, as in the protocol linear, and end with the same head."""
    labels = torch.from_numpy(np.array(manifest.labels))
    classes = manifest.classes or []
    rows = Rows(features, labels, len(classes), settings.device, ranks.rank, ranks.world)
    search = full_data(rows, hold_out(labels.numpy(), HOLD_OUT, settings.seed))
    head, (mean, deviation) = search.classifier, rows.scaling
    logits = linear_logits(lambda images: network.extract(images)[pool], mean, deviation, head)
    about: dict[str, Any] = {
        **network.about,
        "head": "logistic regression",
        "pool": pool,
        "l2": search.l2,
        "converged": head.converged,
        "train": {"shards": manifest.location, "samples": manifest.samples, "fingerprint": manifest.fingerprint},
    }
    identity = {**network.identity, "pool": pool, "head": digest(head.weight, head.bias, mean, deviation)}
    name = f"{network.name}, {pool}"
    return Classifier(name, network.image_size, settings.crop_pct, logits, classes, identity, network.folder, about)


def predictions_of(
    classifier: Classifier,
    manifest: Manifest,
    what: str,
    settings: Settings,
    ranks: Coordinator,
    whole: bool = False,
) -> Tensor:
    """int64 [N]: for each image of a data set one of its labels. what: the data set in a word, for the progress.

    whole: the images are not cropped. They are kept where features are, 4 bytes each. Raises UserError, on all ranks.
    """
    outputs, _ = outputs_of(manifest.classes or [], classifier.classes, manifest.location)
    c = classifier
    identity = {**c.identity, "outputs": outputs.tolist()}
    network = Network(c.name, c.image_size, c.answers(outputs), identity, c.folder, c.about)
    how = extraction_of(replace(settings, crop_pct=1.0 if whole else c.crop_pct))
    return features_of([network], manifest, what, how, ranks)[c.name, PREDICTION][:, 0].long()
