"""Linear classification with all labels of the training set."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimscale.config.base import Strict
from mimscale.data.manifest import Manifest
from mimscale.errors import UserError
from mimscale.evals.logistic_regression import L2_GRID, MAX_ITERATIONS, Classifier, fit, predict, standardised
from mimscale.evals.metrics import mean_per_class, top1
from mimscale.evals.protocols.base import Features, Protocol, Results

HOLD_OUT = 0.1


class LinearConfig(Strict):
    """No options: l2 is chosen with training labels only."""


class Linear(Protocol):
    """logistic regression on all labels of the training set

    Source: the linear probe of CLIP (Radford et al., ICML 2021, arXiv 2103.00020): L-BFGS on the features of one crop
    per image, l2 chosen on data held out. Here this is a tenth of each class of the training set, the grid is
    `L2_GRID`, features are standardised, and L-BFGS stops at `MAX_ITERATIONS`. It is not the linear probe of MAE (He et
    al., CVPR 2022, arXiv 2111.06377: LARS, 90 epochs of random crops, BatchNorm), and the two give different numbers.
    """

    Config = LinearConfig
    metrics: ClassVar = {"linear": "linear, all labels"}
    constants: ClassVar = {"l2_grid": L2_GRID, "hold_out": HOLD_OUT, "max_iterations": MAX_ITERATIONS}

    @classmethod
    def check(cls, config: LinearConfig, train: Manifest, val: Manifest) -> None:
        assert train.labels is not None
        hold_out(train.labels, HOLD_OUT, seed=0)

    def run(self, train: Features, val: Features) -> Results:
        c = self.context
        x, x_val = standardised(train.values, val.values)
        found = full_data(x, train.labels, c.classes, seed=c.seed, device=c.device)
        classifier = found.classifier
        predicted = predict(classifier, x_val)
        return {
            "linear": top1(predicted, val.labels, c.classes),
            "linear_per_class": mean_per_class(predicted, val.labels, c.classes),
            "l2": found.l2,
            "iterations": classifier.iterations,
            "converged": classifier.converged,
            "hold_out_accuracy": list(found.accuracies),
            "search_iterations": list(found.iterations),
            "warnings": [*_unfinished(classifier), *_at_the_edge(found)],
        }


class Search(NamedTuple):
    """classifier: of all training labels, with the l2 that was best on the hold-out.

    accuracies: on the hold-out, in percent, and iterations: of the fit, for each l2 of the grid.
    """

    classifier: Classifier
    l2: float
    accuracies: tuple[float, ...]
    iterations: tuple[int, ...]


def full_data(features_ND: Tensor, labels_N: Tensor, classes: int, *, seed: int, device: torch.device) -> Search:
    """Choose l2 on a tenth of the training set that is held out (the strongest of equals), then fit to all of it."""
    held = torch.from_numpy(hold_out(labels_N.numpy(), HOLD_OUT, seed))
    inside, outside = (~held).nonzero().flatten(), held.nonzero().flatten()
    classifier, accuracies, iterations = None, [], []
    for l2 in L2_GRID:
        classifier = fit(features_ND, labels_N, inside, classes, l2, classifier, device)
        accuracies.append(top1(predict(classifier, features_ND[outside]), labels_N[outside], classes))
        iterations.append(classifier.iterations)
    chosen = L2_GRID[int(np.argmax(accuracies))]
    final = fit(features_ND, labels_N, torch.arange(len(labels_N)), classes, chosen, None, device)
    return Search(final, chosen, tuple(accuracies), tuple(iterations))


def hold_out(labels_N: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """bool [N]: `fraction` of each class, rounded up, but never all of a class. Raises UserError."""
    held = np.zeros(len(labels_N), dtype=np.bool_)
    random = np.random.default_rng(seed)
    for label in np.unique(labels_N):
        members = random.permutation(np.flatnonzero(labels_N == label))
        held[members[: min(len(members) - 1, -int(-len(members) * fraction // 1))]] = True
    if not held.any():
        raise UserError("every class has one training sample only; the linear protocol needs at least two")
    return held


def _unfinished(classifier: Classifier) -> list[str]:
    if classifier.converged:
        return []
    return [f"L-BFGS stopped after {classifier.iterations} iterations without having converged"]


def _at_the_edge(found: Search) -> list[str]:
    """Where an end of the grid is better than its neighbour, the best l2 may lie outside."""
    first, second, *_ = found.accuracies
    if found.l2 == L2_GRID[0] and first > second:
        return [f"l2 = {found.l2:g} was chosen, the strongest of the grid; a stronger one may be better"]
    if found.l2 == L2_GRID[-1]:
        return [f"l2 = {found.l2:g} was chosen, the weakest of the grid; a weaker one may be better"]
    return []
