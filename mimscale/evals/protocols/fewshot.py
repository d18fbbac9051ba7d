"""Linear classification with a few labels per class."""

from __future__ import annotations

import statistics
import warnings
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from mimscale.config.base import Strict
from mimscale.data.manifest import Manifest
from mimscale.errors import UserError
from mimscale.evals.logistic_regression import L2_GRID, MAX_ITERATIONS, standardised
from mimscale.evals.metrics import top1
from mimscale.evals.protocols.base import Context, Features, Protocol, Results

L2_OF_ONE_SHOT = 1e-2  # one label per class leaves nothing to choose with


class FewShotConfig(Strict):
    shots: int = Field(5, ge=1, description="labels per class")
    draws: int = Field(3, ge=1, description="choices of these labels; the mean is reported")


class FewShot(Protocol):
    """logistic regression on a few labels per class

    Source: MSN (Assran et al., ECCV 2022, arXiv 2204.07141): logistic regression on frozen features with 1, 2 or 5
    images per class, mean and deviation over three draws. Here a draw comes from the seed, l2 is chosen by
    cross-validation among the drawn images, and features are standardised with the whole training set, whose other
    labels are not used.
    """

    Config = FewShotConfig
    metrics: ClassVar = {"few_shot": "{shots} labels per class"}
    constants: ClassVar = {"l2_grid": L2_GRID, "max_iterations": MAX_ITERATIONS}

    def __init__(self, config: FewShotConfig, context: Context) -> None:
        super().__init__(config, context)
        self.config: FewShotConfig = config

    @classmethod
    def check(cls, config: FewShotConfig, train: Manifest, val: Manifest) -> None:
        assert train.labels is not None
        few_shot_ids(train.labels, config.shots, seed=0, draw=0)

    def run(self, train: Features, val: Features) -> Results:
        x, x_val = standardised(train.values, val.values)
        queries = x_val.double().numpy()
        draws, strengths = [], []
        for draw in range(self.config.draws):
            ids = few_shot_ids(train.labels.numpy(), self.config.shots, self.context.seed, draw)
            classifier, l2 = few_shot(x[ids], train.labels[ids])
            predicted = torch.from_numpy(classifier.predict(queries))
            draws.append(top1(predicted, val.labels, self.context.classes))
            strengths.append(l2)
        spread = statistics.stdev(draws) if len(draws) > 1 else 0.0
        mean = statistics.fmean(draws)
        return {"few_shot": mean, "few_shot_sd": spread, "few_shot_draws": draws, "few_shot_l2": strengths}


def few_shot_ids(labels_N: NDArray[np.int64], shots: int, seed: int, draw: int) -> NDArray[np.int64]:
    """int64 [classes * shots]: rows of the training set whose labels this draw may see. Raises UserError."""
    random = np.random.default_rng([seed, draw])
    chosen = []
    for label in np.unique(labels_N):
        members = np.flatnonzero(labels_N == label)
        if len(members) < shots:
            raise UserError(f"--shots {shots}: class {label} has {len(members)} training samples; take fewer shots")
        chosen.append(random.choice(members, shots, replace=False))
    return np.concatenate(chosen)


def few_shot(features_ND: Tensor, labels_N: Tensor) -> tuple[LogisticRegression, float]:
    """scikit-learn's fit to a few samples, and its l2: chosen by cross-validation among them, one fold per shot."""
    x, y = features_ND.double().numpy(), labels_N.numpy()
    folds = int(np.bincount(y)[np.unique(y)].min())
    chosen = L2_OF_ONE_SHOT
    if folds > 1:
        splits = list(StratifiedKFold(folds).split(x, y))
        scores = [np.mean([_sklearn_fit(x[a], y[a], l2).score(x[b], y[b]) for a, b in splits]) for l2 in L2_GRID]
        chosen = L2_GRID[int(np.argmax(scores))]
    return _sklearn_fit(x, y, chosen), chosen


def _sklearn_fit(x: NDArray[np.float64], y: NDArray[np.int64], l2: float) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # separable and hardly regularised: the sign is decided
        return LogisticRegression(C=1 / (l2 * len(y)), max_iter=MAX_ITERATIONS).fit(x, y)
