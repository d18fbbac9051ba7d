"""Multinomial logistic regression on frozen features of a whole training set, shared by the ranks.

It minimises mean cross-entropy + l2 / 2 * |W|^2 (the intercept is free) on features that are standardised with the
training set's own mean and deviation: what scikit-learn's LogisticRegression minimises with C = 1 / (l2 * N). SciPy's
L-BFGS takes the steps, as in scikit-learn; loss and gradient come from the device that holds the features.

Sums over samples are taken in `PARTS` parts, each by one rank, and added in one order. So the numbers are the same, to
the bit, for any number of ranks up to that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from mimscale.evals.parallel import PARTS, all_sum, rows_of

MAX_ITERATIONS = 5000
TOLERANCE = 1e-6  # largest entry of the gradient of the mean loss at the end
SUFFICIENT = 1e-4  # the same where the line search finds nothing better in float32: scikit-learn's default tolerance
FLOAT32_NOISE = 1e-10  # relative change of the loss that float32 features no longer resolve
CHUNK = 65_536  # samples whose logits are on the device at a time
ROOM = 0.6  # share of a GPU's free memory that features may take; larger ones stay in host memory


class Classifier(NamedTuple):
    """weight: float32 [classes, D], bias: float32 [classes]. iterations: of L-BFGS. converged: whether the gradient is
    below `TOLERANCE`, or the loss no longer changes in float32; else `MAX_ITERATIONS` ended the fit.
    """

    weight: Tensor
    bias: Tensor
    iterations: int
    converged: bool


class Scaling(NamedTuple):
    """float32 [D] each: the mean and the deviation of a training set; of a channel that never changes 1e-6."""

    mean: Tensor
    deviation: Tensor

    def __call__(self, features_MD: Tensor) -> Tensor:
        """A copy without the mean, divided by the deviation; a channel that is constant in training is 0 there."""
        return features_MD.sub(self.mean).div_(self.deviation)


def scaling_of(features_ND: Tensor, rank: int = 0, world: int = 1) -> Scaling:
    """Of a whole training set, float32 [N, D] in host memory, whose rows the ranks share."""
    total, slices = _parts(len(features_ND), rank, world)

    def mean_of(of: Callable[[Tensor], Tensor]) -> Tensor:
        sums = torch.zeros(total, features_ND.shape[1], dtype=torch.float64)
        for number, rows in slices.items():
            for piece in features_ND[rows].split(CHUNK):
                sums[number] += of(piece.double()).sum(dim=0)
        return _summed(sums, world) / len(features_ND)

    mean = mean_of(lambda x: x)
    deviation = mean_of(lambda x: (x - mean).square()).sqrt()
    return Scaling(mean.float(), deviation.float().clamp_min(1e-6))


def _parts(count: int, rank: int, world: int, parts: int = PARTS) -> tuple[int, dict[int, slice]]:
    """How many parts there are, and the rows of those of this rank, by their number."""
    total = max(world, parts)
    return total, {number: rows_of(count, number, total) for number in range(total)[rows_of(total, rank, world)]}


def _summed(per_part: Tensor, world: int) -> Tensor:
    return (all_sum(per_part) if world > 1 else per_part).sum(dim=0)


class Rows:
    """The part of a training set that this rank works on, standardised.

    features: float32 [N, D], labels: int64 [N] in host memory, the same on all ranks; this rank's part is copied, onto
    the device if it fits there. scaling: None for the mean and deviation of these features. parts: 1 for few samples
    that no other rank shares.
    """

    def __init__(
        self,
        features_ND: Tensor,
        labels_N: Tensor,
        classes: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        scaling: Scaling | None = None,
        parts: int = PARTS,
    ) -> None:
        self.count, self.classes, self.device, self.world = len(features_ND), classes, device, world
        self.total, self.slices = _parts(self.count, rank, world, parts)
        self.scaling = scaling or scaling_of(features_ND, rank, world)
        mine = sum(4 * features_ND[rows].numel() for rows in self.slices.values())
        fits = device.type == "cpu" or mine < ROOM * torch.cuda.mem_get_info(device)[0]
        place = device if fits else torch.device("cpu")
        self.parts = {
            number: (self.scaling(features_ND[rows]).to(place), labels_N[rows].to(device))
            for number, rows in self.slices.items()
        }

    def summed(self, per_part: Tensor) -> Tensor:
        """The sum over axis 0 of a tensor whose rows this rank has filled for its parts only; the others are 0."""
        return _summed(per_part, self.world)


def fit(rows: Rows, l2: float, start: Classifier | None = None, use_N: Tensor | None = None) -> Classifier:
    """L-BFGS from `start` or zero. use: bool [N], the samples to fit to; None: all. The result is on the device.

    All ranks that share the rows must call it at the same time.
    """
    classes, width = rows.classes, len(rows.scaling.mean)
    device = rows.device
    used = {n: None if use_N is None else use_N[rows.slices[n]].to(device) for n in rows.parts}
    count = rows.count if use_N is None else int(use_N.sum())

    def loss_and_gradient(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        w = torch.from_numpy(flat).view(classes, width + 1)
        weight, bias = w[:, :-1].to(device, torch.float32), w[:, -1].to(device, torch.float32)
        losses = torch.zeros(rows.total, dtype=torch.float64, device=device)
        gradients = torch.zeros(rows.total, classes, width + 1, device=device)
        for number, (x, y) in rows.parts.items():
            for start_row in range(0, len(x), CHUNK):
                some = slice(start_row, start_row + CHUNK)
                piece, labels = x[some].to(device), y[some]
                logits = F.linear(piece, weight, bias)
                log_p = logits.log_softmax(dim=1)
                loss = -log_p.gather(1, labels[:, None])[:, 0].double()
                error = log_p.exp_() - F.one_hot(labels, classes)
                mask = used[number]
                if mask is not None:
                    loss, error = loss * mask[some], error * mask[some, None]
                losses[number] += loss.sum()
                gradients[number, :, :-1] += error.T @ piece
                gradients[number, :, -1] += error.sum(dim=0)
        total = float(rows.summed(losses)) / count
        gradient = rows.summed(gradients).double().cpu() / count
        gradient[:, :-1] += l2 * w[:, :-1]
        return total + 0.5 * l2 * float(w[:, :-1].square().sum()), gradient.flatten().numpy()

    if start is None:
        first = np.zeros(classes * (width + 1))
    else:
        first = torch.cat([start.weight, start.bias[:, None]], dim=1).double().cpu().flatten().numpy()
    options = {"maxiter": MAX_ITERATIONS, "maxfun": 2 * MAX_ITERATIONS, "gtol": TOLERANCE, "ftol": FLOAT32_NOISE}
    found = minimize(loss_and_gradient, first, jac=True, method="L-BFGS-B", options={**options, "maxls": 50})
    w = torch.from_numpy(found.x).view(classes, width + 1).to(device, torch.float32)
    converged = found.status == 0 or float(np.abs(found.jac).max()) <= SUFFICIENT
    return Classifier(w[:, :-1].contiguous(), w[:, -1].contiguous(), int(found.nit), converged)


def predict(classifier: Classifier, features_ND: Tensor) -> Tensor:
    """int64 [N] in host memory for standardised features, computed where the classifier is."""
    weight, bias = classifier.weight, classifier.bias
    pieces = (F.linear(piece.to(weight.device), weight, bias) for piece in features_ND.split(CHUNK))
    return torch.cat([logits.argmax(dim=1).cpu() for logits in pieces])  # of no rows: one empty piece
