"""The base classes of methods. A method is one nn.Module: masking, student, heads and loss; inputs: `mimscale.types`.

A method is one file in this package that defines one `Method`; it is found by the file's name. Adding one needs its
file, a test and a recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from pydantic import SerializeAsAny, field_validator
from torch import Tensor, nn

from mimscale.config.registry import MethodConfig, class_in, section_by_name
from mimscale.config.run import RunConfig
from mimscale.errors import UserError
from mimscale.masking.base import Masking, MaskingConfig, describe_ratio
from mimscale.models.beit import Beit
from mimscale.models.convvit import ConvViT
from mimscale.models.patches import unnormalised
from mimscale.models.token_selection import RasterOrder
from mimscale.models.vit import Residual, ViT, set_fused_residuals
from mimscale.optim.ema import STUDENT
from mimscale.types import Batch, Needs, Noise, StepInfo, Targets, TeacherInfo, TeacherNeeds, View


class Method(nn.Module):
    """Base class. A subclass sets `Config` and `needs`, and returns a scalar fp32 "loss" from `forward`.

    Rules that ZeRO needs: every parameter gets a gradient in every step, no parameter is 0-dimensional, a parameter is
    used only in the forward pass of the module that owns it, and `forward` draws no random numbers.
    The encoder is the attribute `student`; its state dict has the names of timm's VisionTransformer or Beit.
    averaged: parameters whose names begin so belong to the moving average.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    averaged: ClassVar[tuple[str, ...]] = (STUDENT,)
    needs: Needs
    student: nn.Module

    @classmethod
    def check(cls, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        """Refuse a configuration that cannot work (grids, depths, missing teachers), before anything is built. Raises
        UserError.
        """

    @classmethod
    def check_classes(cls, run: RunConfig, classes: int) -> None:
        """Refuse a data set with another number of classes than the method has outputs for. Raises UserError.

        classes: of the data set's class names, or its largest label plus one. Not called where there are no labels.
        """

    @classmethod
    def check_batch(cls, run: RunConfig, images: int) -> None:
        """Refuse a number of images that does not do, before anything is built. Raises UserError.

        images: that all ranks together pass through the method at a time, micro-batch x ranks.
        """

    def __init__(self, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        super().__init__()
        self.check(run, teachers)

    def forward(self, batch: Batch, targets: Mapping[str, Targets]) -> dict[str, Tensor]:
        """batch: images normalised, on the device. targets: one entry per teacher in `needs.teachers`.

        Returns {"loss": fp32 scalar, and other named fp32 scalars for the log}.
        """
        raise NotImplementedError

    @property
    def notes(self) -> list[str]:
        """A line for each fast path of the method: which of its twins runs, and why."""
        return []

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides biases and 1-D tensors."""
        return set()

    def layer_of(self, name: str) -> int | None:
        """0-based layer of a parameter for layer-wise lr decay (0 = embeddings); None: not supported by the method."""
        return None

    def view(self, batch: Batch, targets: Mapping[str, Targets]) -> View | None:
        """What the method can show of this batch; no gradient. None: nothing."""
        return None

    @torch.no_grad()
    def visualise(self, batch: Batch, targets: Mapping[str, Targets]) -> View:
        """`view`, and of the unmasked images the student's patch tokens and the attention of its last block.

        Call it on every rank at the same step, because ZeRO-3 gathers parameters in it.
        """
        view = self.view(batch, targets) or View(unnormalised(batch.images))
        student: Any = self.student
        out = student(batch.images, attention=True)
        return replace(view, features=out.tokens[:, student.prefix :], student_attention=out.attention.mean(dim=1))

    def prepare_view(self, batch: Batch) -> Batch:
        """Called on every rank before `visualise` with a batch that `prepare` has not seen; may add to it."""
        return batch

    def before_run(self, samples: int) -> None:
        """Called once on every rank, after the process group is open and before a checkpoint is loaded. samples: in the
        data set.
        """

    def prepare(self, batch: Batch) -> Batch:
        """Called on every rank with every micro-batch in host memory; may add to it what `forward` needs."""
        return batch

    def after_step(self, info: StepInfo) -> None:
        """Called on every rank after each optimiser step, also after a skipped one (`info.skipped`)."""

    def fragments(self) -> dict[str, Tensor]:
        """Tensors for the checkpoint besides parameters and buffers: "table|name|start" -> 1-D, this rank's part of a
        tensor that is split over the ranks (`mimscale.engine.base.Engine.fragments`). A resume fills them.
        """
        return {}

    def extra_state(self) -> dict[str, Any]:
        """JSON-able values for the checkpoint."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `extra_state` returned."""


AnyMasking = SerializeAsAny[MaskingConfig]


def masking_default(policy: str, ratio: float, unit: int | None = None) -> Any:
    """A method's default masking; the values hold unless a recipe sets them."""
    return {"policy": policy, "ratio": ratio, "unit": unit}


class MaskedConfig(MethodConfig):
    """Base of the configurations of methods that mask. masking: a policy of `mimscale.masking` and its settings."""

    masking: AnyMasking = masking_default("random", 0.75)

    @field_validator("masking", mode="before")
    @classmethod
    def _policy_by_name(cls, section: Any) -> Any:
        if isinstance(section, MaskingConfig):
            return section
        if not isinstance(section, Mapping):
            raise ValueError(f"method.masking = {section!r}: must be a section, such as {{policy: attention}}")
        defaults = cls.model_fields["masking"].default
        return section_by_name("mimscale.masking", section, "method.masking.policy", defaults)


def masking_class(config: MaskedConfig) -> type[Masking]:
    """The class of the masking policy."""
    policy: type[Masking] = class_in("mimscale.masking", config.masking.policy, "method.masking.policy")
    return policy


class MaskedMethod(Method):
    """Base of the methods that mask; `masking` is their policy.

    A subclass builds its encoder in `make_student` and names in `teacher_needs` the targets that its loss uses; the
    rest of `needs` follows. predicts_masked: whether the loss needs at least one masked patch.
    """

    Config = MaskedConfig
    predicts_masked: ClassVar[bool] = True
    student: ViT | Beit | ConvViT

    @classmethod
    def teacher_needs(cls, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> dict[str, TeacherNeeds]:
        """Teacher -> the targets that the loss uses."""
        return {}

    @classmethod
    def check(cls, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        """Refuse a policy that does not fit, and teachers that are not used. A subclass first checks its own
        settings.
        """
        config = cast(MaskedConfig, run.method)
        policy, section = masking_class(config), config.masking
        policy.check(section, run, teachers)
        counts = policy.counts(section, run)
        if cls.predicts_masked and counts.masked < 1:
            raise UserError(
                f"{describe_ratio(section, counts)}; raise it, so that at least one is masked: {config.name} needs it"
            )
        used = {**cls.teacher_needs(run, teachers), **policy.teacher_needs(section, teachers)}
        for name in teachers:
            if name not in used:
                raise UserError(
                    f"teachers.{name}: neither {config.name} nor the masking policy {section.policy} uses it; remove it"
                )

    def __init__(self, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        super().__init__(run, teachers)
        config = cast(MaskedConfig, run.method)
        self.student = self.make_student(run)
        set_fused_residuals(self.student, run.engine.uses("fused_residual"))
        self.masking = masking_class(config)(config.masking, run, teachers)
        noise = {"drop_path": Noise("uniform", (self.student.depth, 2))} if run.student.drop_path else {}
        self.needs = Needs(noise=noise, teachers=self.teacher_needs(run, teachers)) | self.masking.needs

    @property
    def notes(self) -> list[str]:
        return [residual_note(self.student)]

    def make_student(self, run: RunConfig) -> Any:
        """Build the encoder."""
        raise NotImplementedError

    def make_view(
        self,
        batch: Batch,
        targets: Mapping[str, Targets],
        raster: RasterOrder,
        reconstruction_B3HW: Tensor | None = None,
    ) -> View:
        """A view of the images, the mask, the importance that it was drawn by, and the reconstruction (in 0..1), if
        any.
        """
        patches = self.student.patches
        return View(
            unnormalised(batch.images),
            mask=raster.scatter(raster.mask, patches),
            dropped=raster.dropped(patches),
            reconstruction=reconstruction_B3HW,
            attention=self.masking.importance(batch, targets),
        )

    def before_run(self, samples: int) -> None:
        self.masking.before_run(samples, self.student)

    def prepare(self, batch: Batch) -> Batch:
        return self.masking.prepare(batch)

    def prepare_view(self, batch: Batch) -> Batch:
        return self.masking.prepare_view(batch)

    def after_step(self, info: StepInfo) -> None:
        self.masking.after_step(info, self.student)

    def fragments(self) -> dict[str, Tensor]:
        return self.masking.fragments()

    def extra_state(self) -> dict[str, Any]:
        return {"masking": self.masking.extra_state()}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self.masking.load_extra_state(state.get("masking", {}))


def residual_note(student: ViT | Beit | ConvViT) -> str:
    """Whether the fast path `fused_residual` runs."""
    rate, fused = student.config.drop_path, next(b.fused for b in student.modules() if isinstance(b, Residual))
    if not fused:
        return "fused_residual: off (as engine.plain says)"
    return f"fused_residual: {f'on (drop path {rate:g})' if rate else 'off (student.drop_path = 0: nothing to fuse)'}"


def masked_note(masked_only: bool, masking: Masking) -> str:
    """Whether the fast path `masked_decoder` runs."""
    if not masked_only:
        return "masked_decoder: off (as engine.plain says)"
    visible, masked, _, _ = masking.count
    return (
        f"masked_decoder: on ({masked} of {visible + masked} {'units' if masking.config.unit else 'patches'} are read)"
    )


def without_drop_path(batch: Batch) -> Batch:
    """The batch without the noise of drop path, for a view: the same masks, no branch dropped."""
    return replace(batch, noise={purpose: noise for purpose, noise in batch.noise.items() if purpose != "drop_path"})
