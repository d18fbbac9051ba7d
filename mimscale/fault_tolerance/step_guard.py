"""What keeps a bad step from the weights, and what happens when bad steps do not end.

*Inside the step*, agreed by all ranks, without reading from the device:

- The loss of the global batch is averaged over ranks and micro-steps before the last backward pass. Where it is not
  finite, or above mean + `loss_spike` deviations of the accepted losses, that backward pass gets NaN. So every gradient
  is NaN, and the check for overflow that every ZeRO stage and precision has skips the step.
- Gradients that are not finite are skipped by the same check.
- A gradient norm above `grad_spike` times its usual size is scaled down to that limit by the step's own clipping, so no
  step moves the moments further than such a gradient would. It is a limit, not a skip: DeepSpeed knows the norm only
  inside its step. The usual size is read every `every` steps.

*After the step*: whether it was skipped, the host knows anyway. `skips` in a row roll the run back to the last
checkpoint before the first of them, and the run jumps over the samples around them; `rollbacks` of those end it with a
report. In fp16 a loss scale that has fallen to `loss_scale_floor` counts like a full row.

The limits are functions of the accepted losses alone, which are those of the whole global batch: the same for any
number of ranks, up to rounding, and part of every checkpoint.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mimscale.fault_tolerance.config import GuardConfig

DECAY = 0.01  # weight of a new loss in mean and variance: a memory of about 100 steps
FLOOR = 0.025  # the deviation counts as at least this share of the mean: a flat curve makes no spike of a ripple


class StepGuard:
    """One per run. micro_steps: of one optimiser step."""

    def __init__(self, config: GuardConfig, micro_steps: int, device: torch.device) -> None:
        self.config, self._micro_steps = config, micro_steps
        self._stats = torch.zeros(3, dtype=torch.float64, device=device)  # mean, variance, count of accepted losses
        self._usual_norm, self._norms = 0.0, 0
        self._seen: list[Tensor] = []  # this rank's losses of the step under way, or of the last one
        self._checked: Tensor | None = None  # the step's loss over all ranks, and the limit it had
        self.streak = 0
        self.incidents = deque[dict[str, Any]](maxlen=100)  # the last skipped steps of this launch
        self.usual: dict[str, float] = {}  # size of each layer's output when all was well

    # ----------------------------------------------------------------------------------------------- inside the step

    def check_loss(self, loss: Tensor) -> Tensor:
        """The loss to go backward with: as it is, or NaN where the step must not reach the weights. Collective."""
        if len(self._seen) == self._micro_steps:
            self._seen = []
        self._seen.append(loss.detach())
        if len(self._seen) < self._micro_steps:
            return loss
        total = torch.stack(self._seen).double().mean()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(total)
            total /= dist.get_world_size()
        limit = self._limit()
        good = total.isfinite() & (total <= limit)
        self._learn(total, good)
        self._checked = torch.stack((total, limit))
        return loss * torch.where(good, 1.0, math.nan).to(loss.dtype)

    def _limit(self) -> Tensor:
        mean, variance, count = self._stats
        if not self.config.loss_spike:
            return torch.full_like(mean, math.inf)
        deviation = torch.maximum(variance.sqrt(), FLOOR * mean.abs())
        return torch.where(count < self.config.warmup, math.inf, mean + self.config.loss_spike * deviation)

    def _learn(self, total: Tensor, good: Tensor) -> None:
        mean, variance, count = self._stats
        share = torch.clamp(1 / (count + 1), min=DECAY)
        delta = total - mean
        learnt = torch.stack((mean + share * delta, (1 - share) * (variance + share * delta**2), count + 1))
        self._stats = torch.where(good, learnt, self._stats)

    def clip(self, recipe_clip: float) -> float:
        """The largest gradient norm of the next step, 0 = none."""
        if not self.config.grad_spike or self._norms * self.config.every < self.config.warmup:
            return recipe_clip
        limit = self.config.grad_spike * self._usual_norm
        return min(limit, recipe_clip) if recipe_clip else limit

    # ----------------------------------------------------------------------------------------------- after the step

    def update(self, skipped: bool, loss_scale: float | None) -> bool:
        """Whether the row of bad steps is full, and the run must go back. loss_scale: None without a dynamic one."""
        self.streak = self.streak + 1 if skipped else 0
        collapsed = skipped and loss_scale is not None and loss_scale <= self.config.loss_scale_floor
        return bool(self.config.skips) and (self.streak >= self.config.skips or collapsed)

    def serious(self, loss_scale: float | None) -> bool:
        """Whether it is time to ask which layer causes the skipped steps: early, before the run has to go back."""
        low = loss_scale is not None and loss_scale <= 8 * self.config.loss_scale_floor
        return low or 2 * self.streak >= self.config.skips > 0

    def reads_norm_at(self, step: int) -> bool:
        """Whether this is a step at which the guard reads the gradient norm."""
        return bool(self.config.grad_spike) and step % self.config.every == 0

    def observe_norm(self, norm: float) -> None:
        """The norm of one step, before clipping. Those of skipped steps do not count."""
        if not math.isfinite(norm):
            return
        limit = self.clip(0.0) or math.inf
        share = max(1 / (self._norms + 1), 0.1)
        self._usual_norm += share * (min(norm, limit) - self._usual_norm)
        self._norms += 1

    def cause(self) -> dict[str, Any]:
        """Why the last step was skipped, as far as this rank sees. Reads from the device."""
        assert self._checked is not None
        loss, limit = self._checked.tolist()
        mine = torch.stack(self._seen).tolist()
        if not math.isfinite(loss):
            why = "the loss is not finite"
        elif loss > limit:
            why = "the loss is above its limit"
        else:
            why = "gradients are not finite"
        bad = [index for index, value in enumerate(mine) if not math.isfinite(value) or value > limit]
        return {"why": why, "loss": loss, "limit": limit, "bad_micro_steps": bad}

    # ------------------------------------------------------------------------------------------------------- resuming

    def dump(self) -> dict[str, Any]:
        """JSON-able; reads from the device."""
        return {
            "losses": self._stats.tolist(),
            "usual_norm": self._usual_norm,
            "norms": self._norms,
            "streak": self.streak,
        }

    def load(self, values: Mapping[str, Any]) -> None:
        """Take back what `dump` gave; nothing to take for a new run."""
        if values:
            self._stats = torch.tensor(values["losses"], dtype=torch.float64, device=self._stats.device)
            self._usual_norm, self._norms = values["usual_norm"], values["norms"]
            self.streak = values["streak"]
