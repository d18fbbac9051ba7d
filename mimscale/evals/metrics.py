"""How right predictions are."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy


def top1(predictions_N: Tensor, labels_N: Tensor, classes: int) -> float:
    """Percent of int64 predictions [N] that equal the labels [N]."""
    share = multiclass_accuracy(predictions_N, labels_N, num_classes=max(classes, 2), average="micro")
    return round(100 * float(share), 4)


def mean_per_class(predictions_N: Tensor, labels_N: Tensor, classes: int) -> float:
    """Percent: the share of right int64 predictions [N] of each class, averaged over the classes that occur."""
    counts = labels_N.bincount(minlength=classes)
    right = labels_N[predictions_N == labels_N].bincount(minlength=classes)
    occurs = counts > 0
    return round(100 * float((right[occurs].double() / counts[occurs]).mean()), 4)
