"""How right predictions are."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy


def top1(predictions_N: Tensor, labels_N: Tensor, classes: int) -> float:
    """Percent of int64 predictions [N] that equal the labels [N]."""
    share = multiclass_accuracy(predictions_N, labels_N, num_classes=classes, average="micro")
    return round(100 * float(share), 4)
