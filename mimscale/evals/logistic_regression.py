"""Multinomial logistic regression on frozen features of a whole training set.

It minimises mean cross-entropy + l2 / 2 * |W|^2 (the intercept is free) on features that are standardised with the
training set's own mean and deviation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

L2_GRID = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # strong to weak: in a search, each fit starts from the one before
MAX_ITERATIONS = 200
MAX_EVALUATIONS = MAX_ITERATIONS * 5 // 4  # of the loss, torch's default
CHUNK = 65_536  # samples on the device at a time


class Classifier(NamedTuple):
    """weight: float32 [classes, D], bias: float32 [classes]. iterations: of L-BFGS, whose limit ended the fit unless
    it converged (gradient, step or change of the loss below its tolerance).
    """

    weight: Tensor
    bias: Tensor
    iterations: int
    converged: bool


def standardised(train_ND: Tensor, val_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the training set's mean removed and divided by its deviation."""
    deviation, mean = torch.std_mean(train_ND, dim=0, correction=0)
    deviation = deviation.clamp_min(1e-6)  # a channel that never changes in training is 0 there
    return train_ND.sub(mean).div_(deviation), val_MD.sub(mean).div_(deviation)


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
        max_eval=MAX_EVALUATIONS,
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
    done = solver.state[weight]
    converged = done["n_iter"] < MAX_ITERATIONS and done["func_evals"] < MAX_EVALUATIONS
    return Classifier(weight.detach(), bias.detach(), done["n_iter"], converged)


def predict(classifier: Classifier, features_ND: Tensor) -> Tensor:
    """int64 [N] in host memory, computed where the classifier is."""
    weight, bias = classifier.weight, classifier.bias
    pieces = (F.linear(piece.to(weight.device), weight, bias) for piece in features_ND.split(CHUNK))
    return torch.cat([logits.argmax(dim=1).cpu() for logits in pieces])
