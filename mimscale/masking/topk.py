"""The patches with the highest CLS attention of a teacher are visible: the same in every epoch, up to the crop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mimscale.config.run import RunConfig
from mimscale.masking.attention import Attention, AttentionConfig
from mimscale.types import Batch, Masks, Needs, Targets, TeacherInfo


class TopK(Attention):
    """Units sorted by importance, ties in raster order. Needs no noise."""

    Config = AttentionConfig

    def __init__(self, config: Any, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        super().__init__(config, run, teachers)
        self.needs = Needs(teachers=self.needs.teachers)

    def choose(self, batch: Batch, targets: Mapping[str, Targets]) -> Masks:
        return self.split(self.unit_importance(targets).argsort(dim=1, descending=True, stable=True))
