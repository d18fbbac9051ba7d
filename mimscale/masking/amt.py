"""AMT: masking and dropping of patches by the student's own attention (Liu et al., AAAI 2023, arXiv 2211.15362).

From time to time the student sees an uncropped image; the attention of its last block gives one importance per patch,
which is stored per sample. Patches are drawn without replacement in proportion to their importance: the first are
masked, the next are dropped (neither seen nor predicted; the paper calls it throwing), the rest is visible. So patches
with high attention tend to be masked. For a student without a class token the mean of the patches' attention is used.

Differences: the release passes all images through the student every 40 epochs, keeps a float copy of all importance in
every process and does not save it. Here the first positions of every global batch come with their uncropped image, so
each sample is updated about once in 1 / `refresh` epochs, by the student of that step; importance is stored in bytes,
split over the ranks and saved in the checkpoint; a sample without an update yet is drawn uniformly. Importance is
cropped and flipped like the image; the release enlarges the same corner of the map for every crop (an integer
division). A crop of the whole image has the release's numbers. SimMIM's layer scale of the attention is applied; the
release omits it, and with ones in its place the numbers are equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from mimscale.config.base import Fraction
from mimscale.config.run import RunConfig
from mimscale.errors import UserError
from mimscale.masking._amt_importance import crop_importance, from_bytes, importance_from_attention, to_bytes
from mimscale.masking._amt_table import ImportanceTable, Ints
from mimscale.masking.attention import attentive_order
from mimscale.masking.base import Counts, Masking, MaskingConfig, check_unit
from mimscale.masking.random import Random
from mimscale.types import Batch, Masks, Needs, Noise, StepInfo, Targets, TeacherInfo, normalised

UNKNOWN = 255  # initial byte of every patch: importance 1, as in the release


class AMTConfig(MaskingConfig):
    """drop_ratio: share of the patches that is dropped; 0: all patches that are not masked are visible.

    warmup_epochs: until then masks are uniform, at the method's default ratio, and nothing is dropped (released: epochs
    0 to 40). refresh: share of each global batch whose uncropped images update the importance.
    """

    drop_ratio: Fraction = 0.0
    warmup_epochs: float = Field(41.0, ge=0)
    refresh: float = Field(0.025, gt=0, le=1)


class UncroppedImages(NamedTuple):
    """The uncropped images of one micro-batch, and the samples and positions of those of every rank.

    ids, positions: W arrays int64 [F_r]. images: this rank's, uint8 [F, 3, H, W] in host memory.
    """

    ids: list[Ints]
    positions: list[Ints]
    images: Tensor


class AMT(Masking):
    """`prepare` reads the importance of a batch from `table`, `after_step` writes new importance into it."""

    Config = AMTConfig

    @classmethod
    def counts(cls, config: Any, run: RunConfig) -> Counts:
        """Rounded as released, with m = ratio and d = drop_ratio. In patches: int(L m) are masked, int(L (m + d)) are
        masked or dropped (196 at 0.45 and 0.40: 88 masked, 78 dropped). In units: ceil(U m) are masked, ceil(U d)
        dropped (49 at 0.44 and 0.26: 22 and 13).
        """
        _, _, units, factor = super().counts(config, run)
        if config.unit is None:
            masked, hidden = int(units * config.ratio), int(units * (config.ratio + config.drop_ratio))
        else:
            masked = math.ceil(units * config.ratio)
            hidden = masked + math.ceil(units * config.drop_ratio)
        return Counts(units - hidden, masked, units, factor)

    @classmethod
    def check(cls, config: Any, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        check_unit(config, run)
        counts = cls.counts(config, run)
        if config.drop_ratio and counts.visible < 1:
            raise UserError(
                f"method.masking.ratio = {config.ratio} and drop_ratio = {config.drop_ratio} leave {counts.visible} of "
                f"{counts.units} {'patches' if config.unit is None else 'units'} visible; lower one of them"
            )
        if run.data.stream is not None:
            raise UserError(
                f"method.masking.policy = amt stores importance per sample and data.shards = {run.data.shards} is a "
                f"stream without sample numbers; index the shards with `python -m data_prep index`"
            )
        super().check(config, run, teachers)
        Random.check(_warmup_config(config, run), run, teachers)

    def __init__(self, config: Any, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        super().__init__(config, run, teachers)
        self.warmup = Random(_warmup_config(config, run), run, teachers)
        self.patch = run.student.patch
        self.global_batch = run.schedule.global_batch
        self.needs = Needs(
            noise={"mask": Noise("exponential", (self.count.units,))},
            uncropped_images=max(1, round(config.refresh * self.global_batch)),
        )
        self.samples = 0
        self.table: ImportanceTable | None = None
        self._step, self._warm = -1, False
        self._uncropped: list[UncroppedImages] = []  # of the micro-batches of the current step

    def before_run(self, samples: int, student: nn.Module) -> None:
        self.samples = samples
        self.table = ImportanceTable(samples, math.prod(self.grid), UNKNOWN, next(student.parameters()).device)

    def prepare(self, batch: Batch) -> Batch:
        assert self.table is not None and batch.uncropped is not None and batch.uncropped_rows is not None
        positions = batch.positions.numpy()
        step = int(positions[0]) // self.global_batch
        if step != self._step:  # also discards what a step that was rolled back has left
            self._step, self._uncropped = step, []
        position = np.full_like(positions, -1)  # -1: without an uncropped image
        position[batch.uncropped_rows.numpy()] = positions[batch.uncropped_rows.numpy()]
        ids_WB, positions_WB = self.table.gather(np.stack([batch.ids.numpy(), position])).swapaxes(0, 1)
        uncropped_ids = [ids[at >= 0] for ids, at in zip(ids_WB, positions_WB, strict=True)]
        images = batch.uncropped.clone()  # the loader's memory is given back before the step ends
        self._uncropped.append(UncroppedImages(uncropped_ids, [at[at >= 0] for at in positions_WB], images))
        self._warm = step * self.global_batch >= self.config.warmup_epochs * self.samples
        return replace(batch, uncropped=None, importance=self.table.read(ids_WB) if self._warm else None)

    def prepare_view(self, batch: Batch) -> Batch:
        assert self.table is not None
        ids_WB = np.tile(batch.ids.cpu().numpy(), (self.table.world, 1))  # the same on every rank
        return replace(batch, importance=self.table.read(ids_WB) if self._warm else None)

    def choose(self, batch: Batch, targets: Mapping[str, Targets]) -> Masks:
        """During the warm-up these are the masks that the policy `random` draws from the same noise."""
        importance_BL = self.importance(batch, targets)
        if importance_BL is None:
            return self.warmup.choose(batch, targets)
        return self.draw(self.unit_sums(importance_BL), batch.noise["mask"])

    def draw(self, importance_BU: Tensor, exponential_noise_BU: Tensor) -> Masks:
        """Draw units in proportion to their importance: the first are masked, the next dropped, the last visible."""
        order = attentive_order(importance_BU, exponential_noise_BU)
        return self.split(order.roll(self.count.visible, dims=1))

    def importance(self, batch: Batch, targets: Mapping[str, Targets]) -> Tensor | None:
        if batch.importance is None:
            return None
        return crop_importance(from_bytes(batch.importance), self.grid, self.patch, batch.boxes, batch.flips)

    @torch.no_grad()
    def after_step(self, info: StepInfo, student: nn.Module) -> None:
        """Pass the uncropped images of the step through the student and write the importance of their samples.

        Every rank makes the same number of forward passes, padded with blank images, because ZeRO-3 gathers parameters
        in each. Importance that is not finite is not written. A skipped step is treated like any other: the weights
        have not changed since the step before, and their attention is as valid as it was then.
        """
        assert self.table is not None
        parts, self._uncropped = self._uncropped, []
        ids = [np.concatenate(of_rank) for of_rank in zip(*(part.ids for part in parts), strict=True)]
        positions = [np.concatenate(of_rank) for of_rank in zip(*(part.positions for part in parts), strict=True)]
        most = max(len(of_rank) for of_rank in ids)
        if not most:
            return
        images = torch.cat([part.images for part in parts]).to(self.table.rows.device, non_blocking=True)
        padded = torch.cat([images, images.new_zeros(most - len(images), *images.shape[1:])])
        micro_batch = len(info.batch.ids)
        passes = [student(normalised(chunk), attention=True).attention for chunk in padded.split(micro_batch)]
        importance_FL = importance_from_attention(torch.cat(passes)[: len(images)])
        valid_F = importance_FL.isfinite().all(dim=1)
        self.table.write(ids, positions, to_bytes(importance_FL.nan_to_num()), valid_F)

    def fragments(self) -> dict[str, Tensor]:
        assert self.table is not None
        return {f"table|masking|{self.table.first * self.table.width}": self.table.rows.view(-1)}


def _warmup_config(config: AMTConfig, run: RunConfig) -> MaskingConfig:
    """Uniform masks at the method's default ratio."""
    ratio = type(run.method).model_fields["masking"].default["ratio"]
    return MaskingConfig(policy="random", ratio=ratio, unit=config.unit)
