"""Features of a teacher as a target: at the patches that a student sees, normalised per token."""

from __future__ import annotations

import torch
from pydantic import field_validator
from torch import Tensor

from mimscale.config import RunConfig, Strict
from mimscale.contracts import Targets, TeacherInfo
from mimscale.errors import UserError
from mimscale.models.heads import Adaptor
from mimscale.models.masking import gather_tokens
from mimscale.models.targets import FeatureNorm, normalise_features


class FeatureConfig(Strict):
    """What the sections of methods that predict features have in common.

    adaptor: from the student's width to the teacher's (mlp_norm is MaskAlign's mlp2). target_norm: LayerNorm without
    affine (whiten), unit length (l2) or as they are, per token. cls_target: predict the class token as well.
    """

    adaptor: Adaptor = "linear"
    target_norm: FeatureNorm = "whiten"
    cls_target: bool = False

    @field_validator("target_norm", mode="before")
    @classmethod
    def _no_batch_statistics(cls, value: object) -> object:
        if value == "bn":
            raise ValueError(
                "target_norm = 'bn' uses the statistics of one rank's batch, so the loss would depend on the number of "
                "ranks; choose whiten, l2 or none"
            )
        return value


def check_grid(name: str, info: TeacherInfo, run: RunConfig) -> None:
    """Refuse a teacher whose patch tokens do not stand where the student's do. Raises UserError."""
    if info.grid != run.grid:
        raise UserError(
            f"teachers.{name} has a {info.grid[0]}x{info.grid[1]} grid at {info.image_size} px, the student "
            f"{run.grid[0]}x{run.grid[1]}; set teachers.{name}.image_size to "
            f"{run.grid[0] * info.image_size // info.grid[0]} so that the grids are equal"
        )


def check_features(config: FeatureConfig, name: str, info: TeacherInfo, run: RunConfig) -> None:
    """Refuse a teacher whose features are not where the student's are. Raises UserError."""
    check_grid(name, info, run)
    if config.cls_target and not info.has_cls:
        raise UserError(
            f"method.cls_target = true, but teachers.{name} has no class token; set method.cls_target = false"
        )


def feature_target(targets: Targets, level: int, visible_BK: Tensor, config: FeatureConfig) -> Tensor:
    """One level's features at the visible patches, class token first if it is a target: float32 [B, (1+)K, C]."""
    features = gather_tokens(targets.levels[level], visible_BK)
    if config.cls_target:
        features = torch.cat([targets.cls[level][:, None], features], dim=1)
    return normalise_features(features, config.target_norm)
