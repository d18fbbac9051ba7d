"""Stochastic gradient descent with momentum. Weight decay is L2: it is added to the gradient, not decoupled."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from mimscale.optim.config import OptimConfig
from mimscale.optim.optimizers.base import Optimizer


class SGDConfig(OptimConfig):
    """momentum: of the gradient. nesterov: Nesterov's form of it."""

    momentum: float = Field(0.9, gt=0, lt=1)
    nesterov: bool = False


class SGD(Optimizer):
    Config: ClassVar = SGDConfig
    TORCH: ClassVar = torch.optim.SGD
    STATES: ClassVar = ("momentum_buffer",)  # zeros are a valid start because dampening is 0
    COUNTS_STEPS: ClassVar = False

    @classmethod
    def options(cls, config: SGDConfig, *, fused: bool) -> dict[str, Any]:
        return {"momentum": config.momentum, "nesterov": config.nesterov, "fused": fused}
