"""Linear classification with all labels of the training set."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mimscale.config.base import Strict
from mimscale.data.manifest import Manifest
from mimscale.errors import UserError
from mimscale.evals.logistic_regression import MAX_ITERATIONS, TOLERANCE, Classifier, Rows, fit, predict
from mimscale.evals.metrics import mean_per_class, top1
from mimscale.evals.parallel import all_rows, rows_of
from mimscale.evals.protocols.base import Features, Protocol, Results

HOLD_OUT = 0.1
L2_GRID = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # strong to weak: each fit starts from the one before
FURTHER = 3  # values by which the grid is extended at most, at the end that wins


class LinearConfig(Strict):
    """No options: l2 is chosen with training labels only."""


class Linear(Protocol):
    """logistic regression on all labels of the training set

    Source: the linear probe of CLIP (Radford et al., ICML 2021, arXiv 2103.00020): L-BFGS on the features of one crop
    per image, l2 chosen on data held out. Here this is a tenth of each class of the training set, the grid is
    `L2_GRID`, extended by up to `FURTHER` values where its end wins, features are standardised, and L-BFGS goes on
    until it has converged. It is not the linear probe of MAE (He et al., CVPR 2022, arXiv 2111.06377: LARS, 90 epochs
    of random crops, BatchNorm), and the two give different numbers.
    """

    Config = LinearConfig
    metrics: ClassVar = {"linear": "linear, all labels"}
    constants: ClassVar = {
        "l2_grid": L2_GRID,
        "hold_out": HOLD_OUT,
        "tolerance": TOLERANCE,
        "max_iterations": MAX_ITERATIONS,
    }
    departs: ClassVar = (
        "one centre crop per image and converged logistic regression, where MAE's linear probe takes 90 epochs of "
        "random crops with LARS and BatchNorm (`linear_mae`)",
    )

    @classmethod
    def check(cls, config: LinearConfig, train: Manifest, val: Manifest) -> None:
        assert train.labels is not None
        hold_out(train.labels, HOLD_OUT, seed=0)

    def run(self, train: Features, val: Features) -> Results:
        c = self.context
        rows = Rows(train.values, train.labels, c.classes, c.device, c.rank, c.world)
        found = full_data(rows, hold_out(train.labels.numpy(), HOLD_OUT, c.seed))
        classifier = found.classifier
        mine = val.values[rows_of(len(val.values), c.rank, c.world)]
        predicted = all_rows(predict(classifier, rows.scaling(mine)), len(val.values), c.rank, c.world)
        return {
            "linear": top1(predicted, val.labels, c.classes),
            "linear_per_class": mean_per_class(predicted, val.labels, c.classes),
            "l2": found.l2,
            "iterations": classifier.iterations,
            "converged": classifier.converged,
            "l2_searched": list(found.strengths),
            "hold_out_accuracy": list(found.accuracies),
            "search_iterations": list(found.iterations),
            "warnings": [*_unfinished(found), *_at_the_edge(found)],
        }


class Search(NamedTuple):
    """classifier: of all training labels, with the l2 that was best on the hold-out.

    strengths: values of l2, strong to weak; accuracies: on the hold-out, in percent, iterations: of the fit, and
    converged, for each.
    """

    classifier: Classifier
    l2: float
    strengths: tuple[float, ...]
    accuracies: tuple[float, ...]
    iterations: tuple[int, ...]
    converged: tuple[bool, ...]


def full_data(rows: Rows, held_N: NDArray[np.bool_], grid: tuple[float, ...] = L2_GRID) -> Search:
    """Choose l2 on the samples that are held out (the strongest of equals), then fit to all of them.

    The grid goes on where its weakest value wins, and where its strongest is better than the next.
    """
    held = torch.from_numpy(held_N)
    fits: dict[float, tuple[float, Classifier]] = {}

    def measure(l2: float, start: Classifier | None) -> None:
        classifier = fit(rows, l2, start, ~held)
        fits[l2] = (_accuracy(classifier, rows, held), classifier)

    for before, l2 in zip((None, *grid), grid, strict=False):
        measure(l2, fits[before][1] if before is not None else None)
    for _ in range(FURTHER):
        strengths, chosen = _in_order(fits)
        if chosen == strengths[-1]:
            measure(float(f"{chosen / 10:.3g}"), fits[chosen][1])
        elif chosen == strengths[0] and fits[chosen][0] > fits[strengths[1]][0]:
            measure(float(f"{chosen * 10:.3g}"), fits[chosen][1])
        else:
            break
    strengths, chosen = _in_order(fits)
    final = fit(rows, chosen, fits[chosen][1])
    accuracies = tuple(fits[l2][0] for l2 in strengths)
    of_each = [fits[l2][1] for l2 in strengths]
    iterations, converged = tuple(c.iterations for c in of_each), tuple(c.converged for c in of_each)
    return Search(final, chosen, tuple(strengths), accuracies, iterations, converged)


def _in_order(fits: dict[float, tuple[float, Classifier]]) -> tuple[list[float], float]:
    """The values of l2, strong to weak, and the best: the strongest of equals."""
    strengths = sorted(fits, reverse=True)
    return strengths, max(strengths, key=lambda l2: fits[l2][0])


def _accuracy(classifier: Classifier, rows: Rows, use_N: torch.Tensor) -> float:
    """Percent right of the samples to `use`, which the ranks share."""
    right = torch.zeros(rows.total, dtype=torch.float64)
    for number, (x, labels) in rows.parts.items():
        use = use_N[rows.slices[number]]
        right[number] = float(((predict(classifier, x) == labels.cpu()) & use).sum())
    return round(100 * float(rows.summed(right)) / int(use_N.sum()), 4)


def hold_out(labels_N: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """bool [N]: `fraction` of each class, rounded up, but never all of a class. Raises UserError."""
    held = np.zeros(len(labels_N), dtype=np.bool_)
    random = np.random.default_rng(seed)
    for label in np.unique(labels_N):
        members = random.permutation(np.flatnonzero(labels_N == label))
        held[members[: min(len(members) - 1, -int(-len(members) * fraction // 1))]] = True
    if not held.any():
        raise UserError("every class of the training set has one sample only, of which none can be held out; give two")
    return held


def _unfinished(found: Search) -> list[str]:
    if not found.classifier.converged:
        return [f"L-BFGS stopped after {found.classifier.iterations} iterations without having converged"]
    cut = [f"{l2:g}" for l2, converged in zip(found.strengths, found.converged, strict=True) if not converged]
    return [f"the search for l2 had not converged at l2 = {', '.join(cut)}"] if cut else []


def _at_the_edge(found: Search) -> list[str]:
    """Where an end of the extended grid is better than its neighbour, the best l2 may lie outside."""
    first, second, *_ = found.accuracies
    if found.l2 == found.strengths[0] and first > second:
        return [f"l2 = {found.l2:g} was chosen, the strongest of the grid; a stronger one may be better"]
    if found.l2 == found.strengths[-1]:
        return [f"l2 = {found.l2:g} was chosen, the weakest of the grid; a weaker one may be better"]
    return []
