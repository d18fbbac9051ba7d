"""A linear classifier in closed form: fast enough to be measured while a run trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mimscale.config.base import Strict
from mimscale.evals.metrics import mean_per_class, top1
from mimscale.evals.parallel import all_rows, all_sum, rows_of
from mimscale.evals.protocols.base import Features, Protocol, Results

L2_GRID = tuple(10.0**power for power in range(-3, 7))
"""Of standardised features: l2 is added to the diagonal of X^T X, whose entries grow with the number of samples."""
CHUNK = 8192


class RidgeConfig(Strict):
    """No options: l2 is chosen with training samples only."""


class Ridge(Protocol):
    """ridge regression onto the classes, in closed form; l2 by leave-one-out

    Least squares onto +1 for the sample's class and -1 for the others on standardised features, with a free intercept;
    the largest output is the class. l2 has the least squared error of leave-one-out over the grid, which the
    eigenvectors of X^T X give exactly. Source: Golub, Heath and Wahba, Technometrics 21(2), 1979 (doi
    10.1080/00401706.1979.10489751); scikit-learn's RidgeClassifierCV is the same. One eigendecomposition and nothing
    that could fail to converge, so it suits a training run; `linear` is the probe to report.
    """

    Config = RidgeConfig
    metrics: ClassVar = {"ridge": "ridge, all labels"}
    constants: ClassVar = {"ridge_l2_grid": L2_GRID}

    def run(self, train: Features, val: Features) -> Results:
        c = self.context
        mine, mine_val = (rows_of(len(of.values), c.rank, c.world) for of in (train, val))
        found = fit(train.values[mine].to(c.device), train.labels[mine].to(c.device), c.classes)
        pieces = val.values[mine_val].split(CHUNK)
        predicted = [found.outputs(piece.to(c.device)).argmax(dim=1).cpu() for piece in pieces]
        every = all_rows(torch.cat(predicted), len(val.values), c.rank, c.world)
        return {
            "ridge": top1(every, val.labels, c.classes),
            "ridge_per_class": mean_per_class(every, val.labels, c.classes),
            "l2": found.l2,
        }


class Classifier(NamedTuple):
    """outputs(x) = (x - mean) / deviation @ weight + bias. weight: float64 [D, classes]; l2: the chosen one."""

    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor
    l2: float

    def outputs(self, features_ND: Tensor) -> Tensor:
        """float64 [N, classes]."""
        return (features_ND.double() - self.mean) / self.deviation @ self.weight + self.bias


def fit(features_nD: Tensor, labels_n: Tensor, classes: int, grid: tuple[float, ...] = L2_GRID) -> Classifier:
    """float32 [n, D], int64 [n]: this rank's rows of the training set, on the device that computes. Collective.

    float64 inside: X^T X squares the condition. Takes 2 x D x D x 8 bytes, and in pieces of CHUNK samples
    (D + 2 x classes) x 8 bytes each.
    """
    device, channels = features_nD.device, features_nD.shape[1]

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=device)

    counts = all_sum(labels_n.bincount(minlength=classes).double())
    count = counts.sum()
    total = zeros(channels)
    for x in features_nD.split(CHUNK):
        total += x.double().sum(dim=0)
    mean, squares = all_sum(total) / count, zeros(channels)
    for x in features_nD.split(CHUNK):
        squares += (x.double() - mean).square().sum(dim=0)
    deviation = (all_sum(squares) / count).sqrt()
    deviation = torch.where(deviation < 1e-6, torch.ones_like(deviation), deviation)  # a channel that never changes
    bias = 2 * counts / count - 1

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        """Standardised features, and targets less their mean, so that the intercept is that mean and free."""
        for x, labels in zip(features_nD.split(CHUNK), labels_n.split(CHUNK), strict=True):
            wanted = torch.full((len(labels), classes), -1.0, dtype=torch.float64, device=device)
            yield (x.double() - mean) / deviation, wanted.scatter_(1, labels.unsqueeze(1), 1.0) - bias

    gram, cross = zeros(channels, channels), zeros(channels, classes)
    for x, wanted in pieces():
        gram += x.T @ x
        cross += x.T @ wanted
    values, vectors = torch.linalg.eigh(all_sum(gram))
    values, cross = values.clamp_min(0), vectors.T @ all_sum(cross)

    errors = zeros(len(grid))
    for x, wanted in pieces():
        along = x @ vectors
        for index, l2 in enumerate(grid):
            kept = along / (values + l2)
            leverage = (kept * along).sum(dim=1, keepdim=True) + 1 / count
            errors[index] += ((wanted - kept @ cross) / (1 - leverage).clamp_min(1e-12)).square().sum()
    l2 = grid[int(all_sum(errors).argmin())]
    return Classifier(mean, deviation, vectors @ (cross / (values + l2).unsqueeze(1)), bias, l2)
