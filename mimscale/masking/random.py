"""Uniform masks: of patches as in MAE (He et al. 2022, sec. 3), of units as in SimMIM (Xie et al. 2022, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mimscale.config.run import RunConfig
from mimscale.masking.base import Masking, MaskingConfig
from mimscale.types import Batch, Masks, Needs, Noise, Targets, TeacherInfo


def random_order(noise_BU: Tensor) -> Tensor:
    """Uniform noise [B, U] -> int64 permutation [B, U]."""
    return torch.argsort(noise_BU, dim=1, stable=True)


class Random(Masking):
    """Of patches the first of the permutation are visible, of units the first are masked, as released."""

    Config = MaskingConfig

    def __init__(self, config: Any, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        super().__init__(config, run, teachers)
        self.needs = Needs(noise={"mask": Noise("uniform", (self.count.units,))})

    def choose(self, batch: Batch, targets: Mapping[str, Targets]) -> Masks:
        order = random_order(batch.noise["mask"])
        return self.split(order if self.config.unit is None else order.roll(-self.count.masked, dims=1))
