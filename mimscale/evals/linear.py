"""Multinomial logistic regression on frozen features: with all labels, or with a few per class.

Both minimise mean cross-entropy + l2 / 2 * |W|^2 (the intercept is free) on features that are standardised with the
training set's own mean and deviation. l2 is chosen with training labels only.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from mimscale.errors import UserError
from mimscale.evals.metrics import top1

L2_GRID = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # strong to weak: each fit starts from the one before
HOLD_OUT = 0.1
MAX_ITERATIONS = 200
CHUNK = 65_536  # samples on the device at a time
L2_OF_ONE_SHOT = 1e-2  # one label per class leaves nothing to choose with


def standardised(train_ND: Tensor, val_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the training set's mean removed and divided by its deviation, in place: they may be large."""
    deviation, mean = torch.std_mean(train_ND, dim=0, correction=0)
    deviation = deviation.clamp_min(1e-6)  # a channel that never changes in training is 0 there
    return train_ND.sub_(mean).div_(deviation), val_MD.sub_(mean).div_(deviation)


class Classifier(NamedTuple):
    """weight: float32 [classes, D], bias: float32 [classes]."""

    weight: Tensor
    bias: Tensor


def fit(
    features_ND: Tensor,
    labels_N: Tensor,
    rows: Tensor,
    classes: int,
    l2: float,
    start: Classifier | None,
    device: torch.device,
) -> Classifier:
    """L-BFGS over the samples `rows` (int64) of features that may stay in host memory. The result is on `device`."""
    weight = start.weight.clone() if start else torch.zeros(classes, features_ND.shape[1], device=device)
    bias = start.bias.clone() if start else torch.zeros(classes, device=device)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    solver = torch.optim.LBFGS(
        parameters,
        max_iter=MAX_ITERATIONS,
        history_size=10,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        total = 0.5 * l2 * weight.square().sum()
        total.backward()
        for some in rows.split(CHUNK):
            logits = F.linear(features_ND[some].to(device), weight, bias)
            part = F.cross_entropy(logits, labels_N[some].to(device), reduction="sum") / len(rows)
            part.backward()
            total = total + part
        return total.detach()

    solver.step(loss)
    return Classifier(weight.detach(), bias.detach())


def full_data(
    features_ND: Tensor, labels_N: Tensor, classes: int, *, seed: int, device: torch.device
) -> tuple[Classifier, float]:
    """The classifier of all training labels, and its l2: the best on a tenth of the training set that was held out."""
    held = torch.from_numpy(hold_out(labels_N.numpy(), HOLD_OUT, seed))
    inside, outside = (~held).nonzero().flatten(), held.nonzero().flatten()
    best, chosen, classifier = -1.0, L2_GRID[0], None
    for l2 in L2_GRID:
        classifier = fit(features_ND, labels_N, inside, classes, l2, classifier, device)
        right = top1(predict(classifier, features_ND[outside]), labels_N[outside], classes)
        if right > best:
            best, chosen = right, l2
    return fit(features_ND, labels_N, torch.arange(len(labels_N)), classes, chosen, None, device), chosen


def predict(classifier: Classifier, features_ND: Tensor) -> Tensor:
    """int64 [N] in host memory, computed where the classifier is."""
    weight, bias = classifier
    pieces = (F.linear(piece.to(weight.device), weight, bias) for piece in features_ND.split(CHUNK))
    return torch.cat([logits.argmax(dim=1).cpu() for logits in pieces])


def hold_out(labels_N: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """bool [N]: `fraction` of each class, rounded up, but never all of a class."""
    held = np.zeros(len(labels_N), dtype=np.bool_)
    random = np.random.default_rng(seed)
    for label in np.unique(labels_N):
        members = random.permutation(np.flatnonzero(labels_N == label))
        held[members[: min(len(members) - 1, -int(-len(members) * fraction // 1))]] = True
    if not held.any():
        raise UserError("every class has one training sample only; the linear protocol needs at least two")
    return held


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


def few_shot(features_ND: Tensor, labels_N: Tensor) -> LogisticRegression:
    """scikit-learn's fit to a handful of samples; l2 is chosen by cross-validation among them, one fold per shot."""
    x, y = features_ND.double().numpy(), labels_N.numpy()
    folds = int(np.bincount(y)[np.unique(y)].min())
    chosen = L2_OF_ONE_SHOT
    if folds > 1:
        splits = list(StratifiedKFold(folds).split(x, y))
        scores = [np.mean([_sklearn_fit(x[a], y[a], l2).score(x[b], y[b]) for a, b in splits]) for l2 in L2_GRID]
        chosen = L2_GRID[int(np.argmax(scores))]
    return _sklearn_fit(x, y, chosen)


def _sklearn_fit(x: NDArray[np.float64], y: NDArray[np.int64], l2: float) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # separable and hardly regularised: the sign is decided
        return LogisticRegression(C=1 / (l2 * len(y)), max_iter=MAX_ITERATIONS).fit(x, y)
