"""AMT: masking and throwing driven by the student's own attention (Gui et al., AAAI 2023, arXiv 2211.15362).

The student looks at whole images now and then; what its last block attends to there is kept as one number per patch and
sample. Patches are then drawn without replacement in proportion to these numbers: the first are masked, the next are
thrown away (nobody sees or predicts them), the rest is seen. So what is attended tends to be masked. For a student
without a class token the mean over the patches' attention stands in.

Differences: the release looks at all images every 40 epochs and holds a float copy of all numbers in every process,
none in the checkpoint. Here the first positions of every global batch bring their whole image along, so a sample is
looked at about once in 1 / `refresh` epochs, by the student of that moment, and the numbers are bytes, cut over the
ranks and saved; a sample not looked at yet is drawn uniformly. The map of numbers goes through the image's own crop and
flip; the release always enlarges the map's corner (`compat: released` brings that back, for comparison, and no recipe
sets it). SimMIM's layer scale of the attention is applied; the release drops it, and with ones in its place the numbers
are equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from mimscale.config.base import Fraction
from mimscale.config.run import RunConfig
from mimscale.errors import UserError
from mimscale.masking._amt_importance import as_bytes, from_bytes, importance_of, through_crop, through_released_crop
from mimscale.masking._amt_table import Ints, Table
from mimscale.masking.attention import attentive_order
from mimscale.masking.base import Counts, Masking, MaskingConfig, check_unit
from mimscale.masking.random import Random
from mimscale.types import Batch, Masks, Needs, Noise, StepInfo, Targets, TeacherInfo, normalised

UNKNOWN = 255  # what every patch starts with: the release's ones


class AMTConfig(MaskingConfig):
    """throw: share of the patches that is thrown away; 0: attention-driven masking alone.

    warmup_epochs: how long masks are uniform, at the method's own ratio and with nothing thrown (as released: epochs 0
    to 40). refresh: share of each global batch whose whole images are looked at.
    compat: released cuts the map as the release does; null is sound.
    """

    throw: Fraction = 0.0
    warmup_epochs: float = Field(41.0, ge=0)
    refresh: float = Field(0.025, gt=0, le=1)
    compat: Literal["released"] | None = None


class Whole(NamedTuple):
    """The whole images of one micro-batch: their samples and positions on every rank, and this rank's pictures.

    ids, places: W arrays int64 [F_r]. images: uint8 [F, 3, H, W] in host memory.
    """

    ids: list[Ints]
    places: list[Ints]
    images: Tensor


class AMT(Masking):
    """`table` holds the numbers; `prepare` brings the batch's rows, `after_step` writes new ones."""

    Config = AMTConfig

    @classmethod
    def counts(cls, config: Any, run: RunConfig) -> Counts:
        """In patches, int(L m) are masked and those up to int(L (m + t)) thrown (196 at 0.45 and 0.40: 88 and 78). In
        units, ceil(U m) and ceil(U t) (49 at 0.44 and 0.26: 22 and 13).
        """
        _, _, units, factor = super().counts(config, run)
        if config.unit is None:
            masked, gone = int(units * config.ratio), int(units * (config.ratio + config.throw))
        else:
            masked = math.ceil(units * config.ratio)
            gone = masked + math.ceil(units * config.throw)
        return Counts(units - gone, masked, units, factor)

    @classmethod
    def check(cls, config: Any, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        check_unit(config, run)
        counts = cls.counts(config, run)
        if config.throw and counts.visible < 1:
            raise UserError(
                f"method.masking.ratio = {config.ratio} and throw = {config.throw} leave {counts.visible} of "
                f"{counts.units} {'patches' if config.unit is None else 'units'} to see; lower one of them"
            )
        if run.data.stream is not None:
            raise UserError(
                f"method.masking.policy = amt keeps numbers for each sample and data.shards = {run.data.shards} is a "
                f"stream without sample numbers; index the shards with `python -m data_prep index`"
            )
        super().check(config, run, teachers)
        Random.check(_plain(config, run), run, teachers)

    def __init__(self, config: Any, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        super().__init__(config, run, teachers)
        self.plain = Random(_plain(config, run), run, teachers)
        self.global_batch, self.image_size = run.schedule.global_batch, run.data.image_size
        self.needs = Needs(
            noise={"mask": Noise("exponential", (self.count.units,))},
            uncropped_images=max(1, round(config.refresh * self.global_batch)),
        )
        self.samples = 0
        self.table: Table | None = None
        self._step = -1
        self._whole: list[Whole] = []

    def before_run(self, samples: int, student: nn.Module) -> None:
        self.samples = samples
        self.table = Table(samples, math.prod(self.grid), UNKNOWN, next(student.parameters()).device)

    def prepare(self, batch: Batch) -> Batch:
        assert self.table is not None and batch.uncropped is not None and batch.uncropped_rows is not None
        positions = batch.positions.numpy()
        step = int(positions[0]) // self.global_batch
        if step != self._step:  # what a step that was given up has left
            self._step, self._whole = step, []
        place = np.full_like(positions, -1)
        place[batch.uncropped_rows.numpy()] = positions[batch.uncropped_rows.numpy()]
        ids, places = self.table.gather(np.stack([batch.ids.numpy(), place])).swapaxes(0, 1)
        whole_ids = [theirs[at >= 0] for theirs, at in zip(ids, places, strict=True)]
        self._whole.append(Whole(whole_ids, [at[at >= 0] for at in places], batch.uncropped))
        warm = step * self.global_batch >= self.config.warmup_epochs * self.samples
        return replace(batch, uncropped=None, importance=self.table.read(ids) if warm else None)

    def choose(self, batch: Batch, targets: Mapping[str, Targets]) -> Masks:
        """Before the end of the warm-up the masks are those that `random` would draw of the same noise."""
        importance = self.weights(batch, targets)
        if importance is None:
            return self.plain.choose(batch, targets)
        return self.draw(self.unit_sums(importance), batch.noise["mask"])

    def draw(self, importance_BU: Tensor, exponential_noise_BU: Tensor) -> Masks:
        """Units in proportion to their importance: the first drawn are masked, the next thrown, the last seen."""
        order = attentive_order(importance_BU, exponential_noise_BU)
        return self.split(order.roll(self.count.visible, dims=1))

    def weights(self, batch: Batch, targets: Mapping[str, Targets]) -> Tensor | None:
        if batch.importance is None:
            return None
        stored, box = from_bytes(batch.importance), (self.grid, batch.boxes, batch.flips)
        if self.config.compat == "released":
            return through_released_crop(stored, *box, self.image_size)
        return through_crop(stored, *box)

    @torch.no_grad()
    def after_step(self, info: StepInfo, student: nn.Module) -> None:
        """Look at the step's whole images with the student as it is now.

        All ranks pass equally many through it, padded with blank ones: ZeRO-3 gathers parameters in each pass. A row
        that is not a number is dropped.
        """
        assert self.table is not None
        whole, self._whole = self._whole, []
        ids = [np.concatenate(parts) for parts in zip(*(part.ids for part in whole), strict=True)]
        places = [np.concatenate(parts) for parts in zip(*(part.places for part in whole), strict=True)]
        total = max(len(theirs) for theirs in ids)
        if not total:
            return
        images = torch.cat([part.images for part in whole]).to(self.table.rows.device, non_blocking=True)
        padded = torch.cat([images, images.new_zeros(total - len(images), *images.shape[1:])])
        passes = [student(normalised(part), attention=True).attention for part in padded.split(len(info.batch.ids))]
        importance = importance_of(torch.cat(passes)[: len(images)])
        valid = importance.isfinite().all(dim=1)
        self.table.write(ids, places, as_bytes(importance.nan_to_num()), valid)

    def live_tensors(self) -> dict[str, Tensor]:
        assert self.table is not None
        return {f"table|masking|{self.table.first * self.table.width}": self.table.rows.view(-1)}


def _plain(config: AMTConfig, run: RunConfig) -> MaskingConfig:
    """Uniform masks at the ratio that the method has by default."""
    ratio = type(run.method).model_fields["masking"].default["ratio"]
    return MaskingConfig(policy="random", ratio=ratio, unit=config.unit)
