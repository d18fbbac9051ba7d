"""Classifiers as rows of an evaluation: a fine-tuned run, or a linear head that is fitted to frozen features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mimscale.config.run import RunConfig
from mimscale.data.manifest import Manifest
from mimscale.errors import UserError
from mimscale.evals.robustness.classes import predicted

PREDICTION = "prediction"
Logits = Callable[[Tensor], Tensor]
"""float32 ImageNet-normalised images [B, 3, H, W] -> float32 [B, classes]."""


@dataclass(frozen=True)
class Classifier:
    """classes: names of its outputs. crop_pct: share of the short side that its centre crop keeps. identity: what its
    predictions depend on. folder: for these. about: for the report.
    """

    name: str
    image_size: int
    crop_pct: float
    logits: Logits
    classes: list[str]
    identity: dict[str, Any]
    folder: Path
    about: dict[str, Any]

    def answers(self, outputs_K: Tensor) -> Callable[[Tensor], dict[str, Tensor]]:
        """An extractor: images -> {"prediction": float32 [B, 1]}, a label of the data set with these outputs."""

        @torch.no_grad()
        def extract(images: Tensor) -> dict[str, Tensor]:
            return {PREDICTION: predicted(self.logits(images).float(), outputs_K)[:, None].float()}

        return extract


def class_names(run: RunConfig, given: Path | None) -> list[str]:
    """Names of a run's outputs, from the manifest of its training set. given: shards in its place. Raises UserError."""
    path = given or Path(run.data.shards if isinstance(run.data.shards, str) else "")
    try:
        names = Manifest.load(path, check_shards=False).classes
    except UserError as error:
        raise UserError(
            f"the names of the classes are in the training set's manifest ({error}); name it with --classes-of SHARDS"
        ) from None
    outputs: int = cast(Any, run.method).classes
    if names is None or len(names) != outputs:
        count = "no names" if names is None else f"{len(names):,} classes"
        raise UserError(f"{path} has {count}, the classifier {outputs:,} outputs; see --classes-of SHARDS")
    return names


def linear_logits(extract: Callable[[Tensor], Tensor], mean_D: Tensor, deviation_D: Tensor, head: Any) -> Logits:
    """A head that was fitted to standardised features. extract: images -> [B, D]. head: its weight and bias."""
    weight = head.weight / deviation_D.to(head.weight)
    bias = head.bias - weight @ mean_D.to(head.weight)
    return lambda images: extract(images).float() @ weight.T + bias


def digest(*tensors: Tensor) -> str:
    """sha256 of the values, which names a head that no checkpoint holds."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
