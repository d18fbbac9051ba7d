"""The sections `evals` and `expected` of a recipe: what is measured while a run trains, and what papers report."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from mimscale.config.base import Strict
from mimscale.config.registry import names_in
from mimscale.errors import nearest

PROTOCOLS = "mimscale.evals.protocols"
LEAST_STEPS = 1000
TRAINED_PER_EVALUATED = 100
"""Of the default interval: an evaluation costs each image one forward pass of the student, a step costs forward and
backward pass of everything, so at 100 images trained for one evaluated the forward passes stay near one per cent."""


def _default_protocols() -> dict[str, dict[str, Any]]:
    return {"knn": {}, "ridge": {}}


class EvalsConfig(Strict):
    """Accuracy of the student's frozen features on a fixed subset, measured while it trains; it changes no weight.

    val: labelled data set to be tested on. train: the one to learn from; default: `data.shards`. every: optimiser steps
    between evaluations; default: 1,000, or more where the run has not trained on 100 times the subset's
    images by then. train_samples, val_samples: size of the subset, at most; the samples lie at equal
    distances in each data set. protocols: name of a file in `mimscale/evals/protocols` -> its options. pool: mean of
    the patch tokens or class token. crop_pct: share of the short side that the centre crop keeps. batch: images of a
    forward pass.

    top1_epochs: epochs between measurements of a classifier's accuracy (method finetune) on the whole of val, at the
    crop of its own section data; null: never.
    """

    val: Path
    train: Path | None = None
    every: int | None = Field(None, ge=1)
    train_samples: int = Field(10_000, ge=2, le=10**7)
    val_samples: int = Field(2_000, ge=1, le=10**7)
    protocols: dict[str, dict[str, Any]] = Field(default_factory=_default_protocols)
    pool: Literal["mean", "cls"] = "mean"
    crop_pct: float = Field(0.875, gt=0, le=1)
    batch: int = Field(64, ge=1, le=2**16)
    top1_epochs: float | None = Field(None, gt=0, le=10**6)

    @field_validator("protocols")
    @classmethod
    def _known(cls, protocols: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        known = names_in(PROTOCOLS)
        for name in protocols:
            if name not in known:
                raise ValueError(f"evals.protocols: '{name}' is unknown{nearest(name, known)}")
        return protocols

    def interval(self, images: int, global_batch: int) -> int:
        """Optimiser steps between evaluations of `images` images."""
        if self.every is not None:
            return self.every
        return max(LEAST_STEPS, -(-TRAINED_PER_EVALUATED * images // global_batch))


class Expected(Strict):
    """What a protocol of `mimscale evaluate` should find, for `mimscale results`; nothing else uses it.

    value: in percent. source: who published it, for which weights. metric: of the protocol's report; default: the
    protocol's name. pool: where the report has several.
    """

    value: float = Field(ge=0, le=100)
    source: str = Field(min_length=1)
    metric: str | None = None
    pool: str | None = None
