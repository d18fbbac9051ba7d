"""What a masking policy is: it says which patches a student sees, which are predicted, and which nobody needs.

A policy is one file in this folder that defines one `Masking`; it is found by the file's name. Adding one needs its
file and a test, and no edit anywhere else. A recipe chooses it with `method.masking: {policy: NAME, ...}`.
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
    """ratio: share of the patches that is masked. unit: side in pixels of the squares that are masked as one; null:
    one patch. Each method has its own ratio and unit, which hold where the recipe gives none.
    """

    policy: str
    ratio: Fraction
    unit: int | None = Field(ge=1)


class Counts(NamedTuple):
    """Numbers of units: visible, masked, and all that there are. factor: patches per side of a unit."""

    visible: int
    masked: int
    units: int
    factor: int


class Masking:
    """Base class. A subclass sets `Config`, `needs` and `choose`, and may learn between steps.

    It is no module: what it learns is none of the optimiser's business.
    """

    Config: ClassVar[type[MaskingConfig]] = MaskingConfig
    needs: Needs

    @classmethod
    def counts(cls, config: Any, run: RunConfig) -> Counts:
        """How a ratio is rounded. In patches, as MAE and MaskAlign do: floor(L x (1 - ratio)) are visible (196 at 0.7:
        58). In units, as SimMIM does: ceil(U x ratio) are masked (49 at 0.6: 30).
        """
        factor = 1 if config.unit is None else config.unit // run.student.patch
        units = (run.grid[0] // factor) * (run.grid[1] // factor)
        visible = int(units * (1 - config.ratio)) if config.unit is None else units - math.ceil(units * config.ratio)
        return Counts(visible, units - visible, units, factor)

    @classmethod
    def reads(cls, config: Any, teachers: Mapping[str, TeacherInfo]) -> dict[str, TeacherNeeds]:
        """What the policy reads of teachers."""
        return {}

    @classmethod
    def check(cls, config: Any, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        """Refuse what cannot work with a UserError, before anything is built."""
        check_unit(config, run)
        counts = cls.counts(config, run)
        if counts.visible < 1:
            raise UserError(f"{keeps(config, counts)}; lower it, so that at least one is seen")

    def __init__(self, config: Any, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        self.config = config
        self.count = self.counts(config, run)
        self.grid = run.grid
        self.unit_grid = (run.grid[0] // self.count.factor, run.grid[1] // self.count.factor)
        self.needs = Needs(teachers=self.reads(config, teachers))

    def choose(self, batch: Batch, targets: Mapping[str, Targets]) -> Masks:
        """batch: images normalised. targets: of the teachers in `needs`. Draws nothing: noise comes in the batch."""
        raise NotImplementedError

    def weights(self, batch: Batch, targets: Mapping[str, Targets]) -> Tensor | None:
        """What decides, [B, L] at any scale, for pictures; None where it is chance alone."""
        return None

    def split(self, order_BU: Tensor) -> Masks:
        """An order of all units, int64 [B, U]: the first are visible, the next masked."""
        visible, masked, _, factor = self.count
        parts = order_BU[:, :visible], order_BU[:, visible : visible + masked]
        return Masks(*(patches_of(ids, self.unit_grid, factor) for ids in parts))

    def unit_sums(self, values_BL: Tensor) -> Tensor:
        """One number per patch [B, L] -> the sum over each unit, float32 [B, U]."""
        factor = self.count.factor
        if factor == 1:
            return values_BL.float()
        rows, columns = self.unit_grid
        return values_BL.float().unflatten(1, (rows, factor, columns, factor)).sum(dim=(2, 4)).flatten(1)

    def before_run(self, samples: int, student: nn.Module) -> None:
        """Called once on every rank, before anything is restored. samples: of the data set. May communicate."""

    def prepare(self, batch: Batch) -> Batch:
        """Every micro-batch in host memory, before it goes to the device; with what `choose` will want. Collective."""
        return batch

    def after_step(self, info: StepInfo, student: nn.Module) -> None:
        """Called once after each optimiser step, on every rank, with the last micro-batch. May communicate."""

    def live_tensors(self) -> dict[str, Tensor]:
        """What must be in the checkpoint besides `extra_state`: "table|name|start" -> 1-D, this rank's part."""
        return {}

    def extra_state(self) -> dict[str, Any]:
        """What must be in the checkpoint: JSON-able values."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `extra_state` gave; {} where the checkpoint has none."""


def check_unit(config: MaskingConfig, run: RunConfig) -> None:
    """Refuse units that are not whole patches or do not tile the image; nothing can be counted before."""
    patch, size = run.student.patch, run.data.image_size
    if config.unit is not None and (config.unit % patch or size % config.unit):
        raise UserError(
            f"method.masking.unit = {config.unit} must be a multiple of student.patch = {patch} and divide "
            f"data.image_size = {size}; {patch} always fits"
        )


def keeps(config: MaskingConfig, counts: Counts) -> str:
    """The beginning of a refusal."""
    what = "patches" if config.unit is None else f"units of {config.unit} px"
    return f"method.masking.ratio = {config.ratio} keeps {counts.visible} of {counts.units} {what}"


def patches_of(units_BN: Tensor, unit_grid: tuple[int, int], factor: int) -> Tensor:
    """Units int64 [B, N] -> their patches int64 [B, N * factor**2]; both counted in raster order.

    unit_grid: rows and columns of units, each of factor x factor patches.
    """
    if factor == 1:
        return units_BN
    columns = unit_grid[1]
    inside = torch.arange(factor, device=units_BN.device)
    offsets = (inside[:, None] * columns * factor + inside).flatten()
    corners = (units_BN // columns * columns * factor + units_BN % columns) * factor
    return (corners[:, :, None] + offsets).flatten(1)
