"""Attentive masking: visible patches are drawn in proportion to a teacher's CLS attention (MaskAlign, Xue et al.
2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mimscale.config.run import RunConfig
from mimscale.errors import UserError
from mimscale.masking.base import Masking, MaskingConfig
from mimscale.models.feature_targets import check_grid
from mimscale.types import Batch, Masks, Needs, Noise, Targets, TeacherInfo, TeacherNeeds

SMALLEST_IMPORTANCE = 1e-30  # in float32: patches without attention are drawn last, in the order of their noise


class AttentionConfig(MaskingConfig):
    """teacher: its attention is used; null: the first teacher with a class token."""

    teacher: str | None = None


def attentive_order(importance_BU: Tensor, exponential_noise_BU: Tensor) -> Tensor:
    """int64 [B, U]: all units, drawn without replacement with probability proportional to importance.

    Sorted by importance / noise, largest first, for unit-rate exponential noise: what torch.multinomial does.
    """
    scores = importance_BU.float().clamp_min(SMALLEST_IMPORTANCE) / exponential_noise_BU.float()
    return torch.argsort(scores, dim=1, descending=True, stable=True)


class Attention(Masking):
    """Units with more attention are more likely to be visible. A unit's importance is the sum over its patches.

    Attention that is NaN counts as 0, so the rare image on which a 16-bit teacher overflows gets a uniform mask; a
    teacher without valid attention is refused before the first step (`teachers.ensemble.TeacherEnsemble.check`).
    """

    Config = AttentionConfig

    @classmethod
    def teacher_needs(cls, config: Any, teachers: Mapping[str, TeacherInfo]) -> dict[str, TeacherNeeds]:
        return {_teacher(config, teachers): TeacherNeeds(cls_attention=True)}

    @classmethod
    def check(cls, config: Any, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        super().check(config, run, teachers)
        name = _teacher(config, teachers)
        check_grid(name, teachers[name], run)

    def __init__(self, config: Any, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        super().__init__(config, run, teachers)
        self.teacher = _teacher(config, teachers)
        self.needs |= Needs(noise={"mask": Noise("exponential", (self.count.units,))})

    def choose(self, batch: Batch, targets: Mapping[str, Targets]) -> Masks:
        return self.split(attentive_order(self.unit_importance(targets), batch.noise["mask"]))

    def unit_importance(self, targets: Mapping[str, Targets]) -> Tensor:
        """float32 [B, U]."""
        attention_BL = targets[self.teacher].cls_attention
        assert attention_BL is not None
        return self.unit_sums(attention_BL.nan_to_num())

    def importance(self, batch: Batch, targets: Mapping[str, Targets]) -> Tensor | None:
        return targets[self.teacher].cls_attention


def _teacher(config: AttentionConfig, teachers: Mapping[str, TeacherInfo]) -> str:
    able = [name for name, info in teachers.items() if info.has_attention]
    if not able:
        raise UserError(
            f"method.masking.policy = {config.policy} needs CLS attention and no teacher has a class token; add one "
            "that has (CLIP, DINO, DINOv2, DINOv3, EVA02) to the section teachers, or set teachers.NAME.attention = "
            "norm, or method.masking.policy = random"
        )
    if config.teacher is not None and config.teacher not in able:
        raise UserError(
            f"method.masking.teacher = {config.teacher} is not a teacher with a class token; choose one of "
            f"{', '.join(able)}"
        )
    return config.teacher or able[0]
