"""What a method is: masking, student, heads and loss in one module. See `mimscale.types` for what goes in.

A method is one file in this folder that defines one `Method`; it is found by the file's name. Adding one needs its
file, a test and a recipe, and no edit anywhere else.
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
from mimscale.masking.base import Masking, MaskingConfig, keeps
from mimscale.models.beit import Beit
from mimscale.models.convvit import ConvViT
from mimscale.models.patches import unnormalised
from mimscale.models.token_selection import Raster
from mimscale.models.vit import ViT
from mimscale.types import Batch, Needs, Noise, StepInfo, Targets, TeacherInfo, TeacherNeeds, View


class Method(nn.Module):
    """Base class. A subclass sets `Config` and `needs`, and returns a scalar fp32 "loss" from `forward`.

    Rules that ZeRO depends on: every parameter gets a gradient in every step, no parameter is 0-dimensional, a
    parameter is used only inside the forward of the module that owns it, and nothing draws random numbers in `forward`.
    The backbone is the attribute `student`, whose state dict has the names of timm's VisionTransformer or Beit.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    needs: Needs
    student: nn.Module

    @classmethod
    def check(cls, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        """Refuse what cannot work (grids, depths, missing teachers) with a UserError, before anything is built."""

    def __init__(self, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        super().__init__()
        self.check(run, teachers)

    def forward(self, batch: Batch, targets: Mapping[str, Targets]) -> dict[str, Tensor]:
        """batch: images normalised, on the device. targets: one entry per teacher in `needs.teachers`.

        Returns {"loss": fp32 scalar, and any other named fp32 scalars for the log}.
        """
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are exempt from weight decay besides biases and 1-D tensors."""
        return set()

    def layer_of(self, name: str) -> int | None:
        """0-based layer of a parameter for layer-wise lr decay (0 = embeddings); None: the method has no such order."""
        return None

    def view(self, batch: Batch, targets: Mapping[str, Targets]) -> View | None:
        """What the method itself shows of this batch; no gradient."""
        return None

    @torch.no_grad()
    def visualise(self, batch: Batch, targets: Mapping[str, Targets]) -> View:
        """All that there is to see: `view`, and the student's tokens of the whole images.

        Every rank calls it at the same step, because ZeRO-3 gathers parameters in it.
        """
        seen = self.view(batch, targets) or View(unnormalised(batch.images))
        student: Any = self.student
        return replace(seen, features=student(batch.images).tokens[:, student.prefix :])

    def before_run(self, samples: int) -> None:
        """Called once on every rank, when they are connected and before anything is restored, with the size of the
        data set.
        """

    def prepare(self, batch: Batch) -> Batch:
        """Called with every micro-batch while it is in host memory, for what a method learned of its samples."""
        return batch

    def after_step(self, info: StepInfo) -> None:
        """Called once after each optimiser step, for what a method learns between steps."""

    def live_tensors(self) -> dict[str, Tensor]:
        """What a method learned between steps, for the checkpoint: "table|name|start" -> 1-D, this rank's part of what
        is cut over the ranks. A resume fills these tensors.
        """
        return {}

    def extra_state(self) -> dict[str, Any]:
        """What must be in the checkpoint besides parameters and buffers: JSON-able values."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `extra_state` gave."""


AnyMasking = SerializeAsAny[MaskingConfig]


def masking_default(policy: str, ratio: float, unit: int | None = None) -> Any:
    """A method's own masking; each value fills in where a recipe gives none."""
    return {"policy": policy, "ratio": ratio, "unit": unit}


class MaskedConfig(MethodConfig):
    """Base of the sections of methods that mask. masking: which patches are seen (`mimscale.masking`, by `policy`)."""

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
    """The policy that a method's section chooses."""
    policy: type[Masking] = class_in("mimscale.masking", config.masking.policy, "method.masking.policy")
    return policy


class MaskedMethod(Method):
    """Base of the methods whose `student` does not see all patches: `masking` chooses them.

    A subclass builds its student in `make_student` and says in `reads` what its loss reads of teachers; the rest of
    `needs` follows. predicts_masked: whether it needs at least one masked patch.
    """

    Config = MaskedConfig
    predicts_masked: ClassVar[bool] = True
    student: ViT | Beit | ConvViT

    @classmethod
    def reads(cls, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> dict[str, TeacherNeeds]:
        """What the loss reads of teachers."""
        return {}

    @classmethod
    def check(cls, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        """Refuse a policy that does not fit, and teachers that nobody reads. A subclass checks its own first."""
        config = cast(MaskedConfig, run.method)
        policy, section = masking_class(config), config.masking
        policy.check(section, run, teachers)
        counts = policy.counts(section, run)
        if cls.predicts_masked and counts.masked < 1:
            raise UserError(
                f"{keeps(section, counts)}; raise it, so that at least one is masked: {config.name} needs it"
            )
        read = {**cls.reads(run, teachers), **policy.reads(section, teachers)}
        for name in teachers:
            if name not in read:
                raise UserError(
                    f"teachers.{name}: neither {config.name} nor masking by {section.policy} reads it; remove it"
                )

    def __init__(self, run: RunConfig, teachers: Mapping[str, TeacherInfo]) -> None:
        super().__init__(run, teachers)
        config = cast(MaskedConfig, run.method)
        self.student = self.make_student(run)
        self.masking = masking_class(config)(config.masking, run, teachers)
        noise = {"drop_path": Noise("uniform", (self.student.depth, 2))} if run.student.drop_path else {}
        self.needs = Needs(noise=noise, teachers=self.reads(run, teachers)) | self.masking.needs

    def make_student(self, run: RunConfig) -> Any:
        raise NotImplementedError

    def seen(
        self, batch: Batch, targets: Mapping[str, Targets], raster: Raster, reconstruction_B3HW: Tensor | None = None
    ) -> View:
        """The images, the mask and the attention that chose it, and every patch as predicted, in 0..1, if it is."""
        patches = self.student.patches
        return View(
            unnormalised(batch.images),
            mask=raster.spread(raster.mask, patches),
            thrown=raster.thrown(patches),
            reconstruction=reconstruction_B3HW,
            attention=self.masking.weights(batch, targets),
        )

    def before_run(self, samples: int) -> None:
        self.masking.before_run(samples, self.student)

    def prepare(self, batch: Batch) -> Batch:
        return self.masking.prepare(batch)

    def after_step(self, info: StepInfo) -> None:
        self.masking.after_step(info, self.student)

    def live_tensors(self) -> dict[str, Tensor]:
        return self.masking.live_tensors()

    def extra_state(self) -> dict[str, Any]:
        return {"masking": self.masking.extra_state()}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self.masking.load_extra_state(state.get("masking", {}))


def without_drop_path(batch: Batch) -> Batch:
    """The batch as a picture wants it: the same masks, every branch of the network on."""
    return replace(batch, noise={purpose: noise for purpose, noise in batch.noise.items() if purpose != "drop_path"})
