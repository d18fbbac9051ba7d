"""The base class of masking policies. A policy decides which patches are visible, which masked and which dropped.

A policy is one file in this package that defines one `Masking`; it is found by the file's name. A recipe chooses it
with `method.masking: {policy: NAME, ...}`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from mimscale.config.base import Fraction, Strict
from mimscale.config.run import RunConfig
from mimscale.errors import UserError
from mimscale.types import Batch, Masks, Needs, StepInfo, Targets, TeacherInfo, TeacherNeeds


class MaskingConfig(Strict):
    """policy: file of the masking policy in mimscale/masking. ratio: share of the patches that is masked. unit: side in
    pixels of the squares that are masked as a whole; null: one patch. Each method has a default ratio and unit.
    """

    policy: str
    ratio: Fraction
    unit: int | None = Field(ge=1)


class Counts(NamedTuple):
    """Numbers of units: visible, masked, and in all (the rest is dropped). factor: patches per side of a unit."""

    visible: int
    masked: int
    units: int
    factor: int


class Masking:
    """Base class. A subclass sets `Config` and `needs` and implements `choose`; the hooks at the end are optional.

    Not an nn.Module: it has no parameters for the optimiser.
    """

    Config: ClassVar[type[MaskingConfig]] = MaskingConfig
    needs: Needs

    @classmethod
    def counts(cls, config: Any, run: RunConfig) -> Counts:
        """Rounds the ratio. In patches as in MAE and MaskAlign: floor(L x (1 - ratio)) are visible (196 at 0.7: 58). In
        units as in SimMIM: ceil(U x ratio) are masked (49 at 0.6: 30).
        """
        factor = 1 if config.unit is None else config.unit // run.student.patch
        units = (run.grid[0] // factor) * (run.grid[1] // factor)
        visible = int(units * (1 - config.ratio)) if config.unit is None else units - math.ceil(units * config.ratio)
        return Counts(visible, units - visible, units, factor)

    @classmethod
    def teacher_needs(cls, config: Any, teachers: Mapping[str, TeacherInfo]) -> dict[str, TeacherNeeds]:
        """Teacher -> the targets that the policy uses."""
        return {}

    @classmethod
    def check(cls, config: Any, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        """Refuse a configuration that cannot work, before anything is built. Raises UserError."""
        check_unit(config, run)
        counts = cls.counts(config, run)
        if counts.visible < 1:
            raise UserError(f"{describe_ratio(config, counts)}; lower it, so that at least one is visible")

    def __init__(self, config: Any, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        self.config = config
        self.count = self.counts(config, run)
        self.grid = run.grid
        self.unit_grid = (run.grid[0] // self.count.factor, run.grid[1] // self.count.factor)
        self.needs = Needs(teachers=self.teacher_needs(config, teachers))

    def choose(self, batch: Batch, targets: Mapping[str, Targets]) -> Masks:
        """batch: images normalised. targets: of the teachers in `needs`. Draws no random numbers: noise is in the
        batch.
        """
        raise NotImplementedError

    def importance(self, batch: Batch, targets: Mapping[str, Targets]) -> Tensor | None:
        """Importance of the patches that the masks depend on, [B, L] at any scale; None if masks are uniform."""
        return None

    def split(self, order_BU: Tensor) -> Masks:
        """A permutation of all units, int64 [B, U]: the first are visible, the next masked, the rest dropped."""
        visible, masked, _, factor = self.count
        parts = order_BU[:, :visible], order_BU[:, visible : visible + masked]
        return Masks(*(patches_of(ids, self.unit_grid, factor) for ids in parts))

    def unit_sums(self, values_BL: Tensor) -> Tensor:
        """Values of patches [B, L] -> their sum over each unit, float32 [B, U]."""
        factor = self.count.factor
        if factor == 1:
            return values_BL.float()
        rows, columns = self.unit_grid
        return values_BL.float().unflatten(1, (rows, factor, columns, factor)).sum(dim=(2, 4)).flatten(1)

    def before_run(self, samples: int, student: nn.Module) -> None:
        """Called once on every rank, before a checkpoint is loaded. samples: in the data set. May communicate."""

    def prepare(self, batch: Batch) -> Batch:
        """Called with every micro-batch in host memory; may add what `choose` needs. On every rank; may communicate."""
        return batch

    def prepare_view(self, batch: Batch) -> Batch:
        """The same for a batch on the device that is shown and not trained on. Must not change the policy."""
        return batch

    def after_step(self, info: StepInfo, student: nn.Module) -> None:
        """Called on every rank after each optimiser step, also after a skipped one. May communicate."""

    def fragments(self) -> dict[str, Tensor]:
        """Tensors for the checkpoint: "table|name|start" -> 1-D, this rank's part. A resume fills them."""
        return {}

    def extra_state(self) -> dict[str, Any]:
        """JSON-able values for the checkpoint."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `extra_state` returned; {} if the checkpoint has none."""


def check_unit(config: MaskingConfig, run: RunConfig) -> None:
    """Refuse units that are not a multiple of the patch or do not tile the image. Call before `counts`."""
    patch, size = run.student.patch, run.data.image_size
    if config.unit is not None and (config.unit % patch or size % config.unit):
        raise UserError(
            f"method.masking.unit = {config.unit} must be a multiple of student.patch = {patch} and divide "
            f"data.image_size = {size}; {patch} always fits"
        )


def describe_ratio(config: MaskingConfig, counts: Counts) -> str:
    """The beginning of an error message about the ratio."""
    what = "patches" if config.unit is None else f"units of {config.unit} px"
    return f"method.masking.ratio = {config.ratio} leaves {counts.visible} of {counts.units} {what} visible"


def patches_of(units_BN: Tensor, unit_grid: tuple[int, int], factor: int) -> Tensor:
    """Units int64 [B, N] -> their patches int64 [B, N * factor**2]; both numbered in raster order.

    unit_grid: rows and columns of units, each of factor x factor patches.
    """
    if factor == 1:
        return units_BN
    columns = unit_grid[1]
    inside = torch.arange(factor, device=units_BN.device)
    offsets = (inside[:, None] * columns * factor + inside).flatten()
    corners = (units_BN // columns * columns * factor + units_BN % columns) * factor
    return (corners[:, :, None] + offsets).flatten(1)
