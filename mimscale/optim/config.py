"""The sections `optim`, `ema` and `schedule` of a recipe."""

from __future__ import annotations

from math import inf
from typing import Literal

from pydantic import Field, model_validator

from mimscale.config.base import Fraction, Strict


class OptimConfig(Strict):
    """Base of every optimiser's own section; the others' keys stand in mimscale/optim/optimizers/<name>.py.

    name: file of the optimiser in mimscale/optim/optimizers. weight_decay: of the parameters that
    `param_groups.is_decayed` names. layer_decay: factor of the learning rate from one layer to the one below; 1 = off.
    clip: global L2 norm of the gradients to which larger ones are scaled; 0 = off.
    """

    name: str
    weight_decay: float = Field(0.0, ge=0, le=1e3)
    layer_decay: float = Field(1.0, gt=0, le=1)
    clip: float = Field(0.0, ge=0, le=1e6)


class EmaConfig(Strict):
    """The section `ema`: an exponential moving average of the student's weights, in float32, kept in every checkpoint.

    decay: after each step that was not skipped, average = decay x average + (1 - decay) x weights.
    """

    decay: Fraction = 0.9999


class ScheduleConfig(Strict):
    """How the learning rate moves; the peak is base_lr x global_batch / lr_batch. The curves are in lr_schedule.py.

    kind: the curve. cosine is MAE's; timm_cosine and multistep (x gamma at each epoch of `milestones`) are SimMIM's;
    openmmlab_cosine is that of MFF's and PixMIM's release.
    warmup_lr: learning rate at which the warm-up starts, absolute. min_lr: the one at which the cosine ends, absolute.
    warmup_start_factor: of openmmlab_cosine instead of warmup_lr, where the warm-up starts as a share of the peak.
    global_batch: images of one optimiser step, over all ranks and accumulated micro-batches.
    epochs: length of the run; an epoch has floor(samples / global_batch) steps. steps: the same in optimiser steps, for
    a short run; give one of the two. warmup_epochs: epochs in which the rate rises.
    base_lr: learning rate at a global batch of lr_batch. lr_batch: images that base_lr belongs to.
    milestones: epochs, of multistep. gamma: factor at each of them.
    """

    kind: Literal["cosine", "timm_cosine", "multistep", "openmmlab_cosine"] = "cosine"
    global_batch: int = Field(ge=1, le=2**24)
    epochs: float | None = Field(None, gt=0)
    steps: int | None = Field(None, ge=1)
    warmup_epochs: float = Field(0.0, ge=0)
    base_lr: float = Field(gt=0, le=1e3)
    lr_batch: int = Field(256, ge=1, le=2**24)
    warmup_lr: float = Field(0.0, ge=0)
    warmup_start_factor: float = Field(0.0, ge=0, le=1)
    min_lr: float = Field(0.0, ge=0)
    milestones: tuple[float, ...] = ()
    gamma: float = Field(0.1, gt=0, le=1)

    @model_validator(mode="after")
    def _one_length(self) -> ScheduleConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("needs exactly one of epochs and steps; set the other to null")
        if self.epochs is not None and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs = {self.warmup_epochs} must be below epochs = {self.epochs}")
        return self

    @model_validator(mode="after")
    def _milestones_fit(self) -> ScheduleConfig:
        given = f"milestones = {list(self.milestones)}"
        if bool(self.milestones) != (self.kind == "multistep"):
            raise ValueError(f"{given} with kind = {self.kind}: multistep needs some, the cosines have none")
        if list(self.milestones) != sorted(self.milestones) or min(self.milestones, default=inf) < self.warmup_epochs:
            raise ValueError(f"{given}: must rise and not lie inside the warm-up of {self.warmup_epochs:g} epochs")
        if self.kind == "multistep" and self.min_lr:
            raise ValueError(f"min_lr = {self.min_lr} with kind = multistep: only a cosine has a floor; remove it")
        return self

    @model_validator(mode="after")
    def _one_warmup_start(self) -> ScheduleConfig:
        if self.kind == "openmmlab_cosine" and self.warmup_lr:
            raise ValueError(f"warmup_lr = {self.warmup_lr} with kind = {self.kind}: give warmup_start_factor instead")
        if self.kind != "openmmlab_cosine" and self.warmup_start_factor:
            given = f"warmup_start_factor = {self.warmup_start_factor}"
            raise ValueError(f"{given} with kind = {self.kind}: only openmmlab_cosine has one; give warmup_lr instead")
        return self

    @model_validator(mode="after")
    def _ends_are_below_the_peak(self) -> ScheduleConfig:
        if self.peak_lr > 1e3:
            raise ValueError(
                f"base_lr = {self.base_lr:g} x global_batch = {self.global_batch} / lr_batch = {self.lr_batch} gives a "
                f"learning rate of {self.peak_lr:g}, above 1000; lower base_lr"
            )
        for name, rate in (("warmup_lr", self.warmup_lr), ("min_lr", self.min_lr)):
            if rate > self.peak_lr:
                raise ValueError(
                    f"{name} = {rate:g} is above the peak of {self.peak_lr:g} = base_lr x global_batch / lr_batch; "
                    f"lower it"
                )
        return self

    @property
    def peak_lr(self) -> float:
        return self.base_lr * self.global_batch / self.lr_batch
