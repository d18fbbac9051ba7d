"""What a method is: masking, student, heads and loss in one module. See `mimscale.contracts` for what goes in.

A method is one file in this folder that defines one `Method`; it is found by the file's name. Adding one needs its
file, a test and a recipe, and no edit anywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mimscale.config import MethodConfig, RunConfig
from mimscale.contracts import Batch, Needs, Targets, TeacherInfo, View
from mimscale.errors import UserError
from mimscale.models.patches import unnormalised


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
    def look(self, batch: Batch, targets: Mapping[str, Targets]) -> View:
        """All that there is to see: `view`, and the student's tokens of the whole images.

        Every rank calls it at the same step, because ZeRO-3 gathers parameters in it.
        """
        seen = self.view(batch, targets) or View(unnormalised(batch.images))
        student: Any = self.student
        return replace(seen, features=student(batch.images).tokens[:, student.prefix :])

    def after_step(self, batch: Batch) -> None:
        """Called once after each optimiser step, for what a method learns between steps."""

    def extra_state(self) -> dict[str, Any]:
        """What must be in the checkpoint besides parameters and buffers: JSON-able values."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `extra_state` gave."""


def check_grid(name: str, info: TeacherInfo, run: RunConfig) -> None:
    """Refuse a teacher whose patch tokens do not stand where the student's do. Raises UserError."""
    if info.grid != run.grid:
        raise UserError(
            f"teachers.{name} has a {info.grid[0]}x{info.grid[1]} grid at {info.image_size} px, the student "
            f"{run.grid[0]}x{run.grid[1]}; set teachers.{name}.image_size to "
            f"{run.grid[0] * info.image_size // info.grid[0]} so that the grids are equal"
        )
