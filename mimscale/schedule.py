"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math


def lr_at(epoch: float, *, peak: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """Learning rate at a fractional epoch: linear from 0 to `peak` over the warm-up, then half a cosine to `min_lr`.

    The curve of MAE and MaskAlign (Loshchilov and Hutter 2017, eq. 5, without restarts). Constant after the end.
    """
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    if epochs <= warmup_epochs:
        return peak
    progress = min((epoch - warmup_epochs) / (epochs - warmup_epochs), 1.0)
    return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def lr(step: int, steps_per_epoch: float, *, peak: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """Learning rate of optimiser step `step` (0-based): the first step of a warm-up has exactly 0."""
    return lr_at(step / steps_per_epoch, peak=peak, min_lr=min_lr, warmup_epochs=warmup_epochs, epochs=epochs)
