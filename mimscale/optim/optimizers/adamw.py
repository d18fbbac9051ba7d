"""AdamW (Loshchilov and Hutter 2019): Adam with decoupled weight decay."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from mimscale.config.base import Fraction
from mimscale.optim.config import OptimConfig
from mimscale.optim.optimizers.base import Optimizer


class AdamWConfig(OptimConfig):
    """betas: decay of the two moments. eps: added to the root of the second moment."""

    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0, le=1)
    weight_decay: float = Field(0.05, ge=0, le=1e3)


class AdamW(Optimizer):
    Config: ClassVar = AdamWConfig
    TORCH: ClassVar = torch.optim.AdamW
    STATES: ClassVar = ("exp_avg", "exp_avg_sq")
    COUNTS_STEPS: ClassVar = True

    @classmethod
    def options(cls, config: AdamWConfig, *, fused: bool) -> dict[str, Any]:
        return {"betas": config.betas, "eps": config.eps, "fused": fused}
