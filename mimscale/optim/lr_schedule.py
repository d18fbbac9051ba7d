"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from mimscale.optim.config import ScheduleConfig


def cosine_with_warmup(
    epoch: float, *, peak: float, min_lr: float, warmup_epochs: float, epochs: float, warmup_lr: float = 0.0
) -> float:
    """Rate at a fractional epoch: linear from `warmup_lr` to `peak` over the warm-up, then half a cosine to `min_lr`.

    The curve of MAE and MaskAlign (Loshchilov and Hutter 2017, eq. 5, without restarts). Constant after the end.
    """
    if epoch < warmup_epochs:
        return warmup_lr + (peak - warmup_lr) * epoch / warmup_epochs
    if epochs <= warmup_epochs:
        return peak
    progress = min((epoch - warmup_epochs) / (epochs - warmup_epochs), 1.0)
    return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def cosine_at_step(
    step: int,
    steps_per_epoch: float,
    *,
    peak: float,
    min_lr: float,
    warmup_epochs: float,
    epochs: float,
    warmup_lr: float = 0.0,
) -> float:
    """Learning rate of optimiser step `step` (0-based): the first step of a warm-up has exactly `warmup_lr`."""
    return cosine_with_warmup(
        step / steps_per_epoch,
        peak=peak,
        min_lr=min_lr,
        warmup_epochs=warmup_epochs,
        epochs=epochs,
        warmup_lr=warmup_lr,
    )


def timm_cosine(clock: int, *, peak: float, min_lr: float, steps: int) -> float:
    """timm's cosine after `clock` steps: it also runs during the warm-up, so the rate drops where that ends."""
    if clock >= steps:
        return min_lr
    return min_lr + 0.5 * (peak - min_lr) * (1 + math.cos(math.pi * clock / steps))


def multistep(clock: int, *, peak: float, milestones: Sequence[float], gamma: float) -> float:
    """The peak times gamma for each milestone (in steps) that `clock` has reached."""
    return peak * gamma ** bisect_right(milestones, clock)


def openmmlab_cosine(
    step: int, *, peak: float, min_lr: float, warmup_steps: int, steps: int, warmup_start_factor: float
) -> float:
    """OpenMMLab's LinearLR, then its CosineAnnealingLR, both moved once per step (mmengine, convert_to_iter_based).

    Step k of W warm-up steps has peak x (f + (1 - f) k / (W - 1)): the last of them already has the peak, and so has
    step W, where half a cosine to `min_lr` starts. W = 1 is one step at f x peak. Constant from step `steps` on.
    """
    if step < warmup_steps:
        return peak * (warmup_start_factor + (1 - warmup_start_factor) * step / max(warmup_steps - 1, 1))
    if steps <= warmup_steps:
        return peak
    progress = min((step - warmup_steps) / (steps - warmup_steps), 1.0)
    return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def lr_at_step(curve: ScheduleConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Learning rate of optimiser step `step` (0-based) of a run of `total_steps`.

    timm_cosine and multistep are SimMIM's and keep the lag of its loop, which moves the scheduler after the optimiser:
    step t uses the rate of clock t - 1, so that steps 0 and 1 both use `warmup_lr`.
    """
    if curve.kind == "cosine":
        return cosine_at_step(
            step,
            steps_per_epoch,
            peak=curve.peak_lr,
            min_lr=curve.min_lr,
            warmup_epochs=curve.warmup_epochs,
            epochs=curve.epochs or total_steps / steps_per_epoch,
            warmup_lr=curve.warmup_lr,
        )
    warmup = int(curve.warmup_epochs * steps_per_epoch)
    if curve.kind == "openmmlab_cosine":
        return openmmlab_cosine(
            step,
            peak=curve.peak_lr,
            min_lr=curve.min_lr,
            warmup_steps=warmup,
            steps=total_steps,
            warmup_start_factor=curve.warmup_start_factor,
        )
    clock = max(step - 1, 0)
    if clock < warmup:
        return curve.warmup_lr + (curve.peak_lr - curve.warmup_lr) * clock / warmup
    if curve.kind == "timm_cosine":
        return timm_cosine(clock, peak=curve.peak_lr, min_lr=curve.min_lr, steps=total_steps)
    milestones = [epoch * steps_per_epoch for epoch in curve.milestones]
    return multistep(clock, peak=curve.peak_lr, milestones=milestones, gamma=curve.gamma)
