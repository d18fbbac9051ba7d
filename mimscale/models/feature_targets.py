"""Teacher features as targets: which teachers, which levels, selected at the visible patches, normalised per token."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, NamedTuple

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from mimscale.config.base import Strict
from mimscale.config.registry import MethodConfig
from mimscale.config.run import RunConfig
from mimscale.errors import UserError
from mimscale.models.heads import Adaptor, level_weights
from mimscale.models.targets import FeatureNorm, normalise_features
from mimscale.models.token_selection import gather_tokens
from mimscale.types import Targets, TeacherInfo, TeacherNeeds


def _no_batch_statistics(value: object) -> object:
    if value == "bn":
        raise ValueError(
            "target_norm = 'bn' uses the statistics of one rank's batch, so the loss would depend on the number of "
            "ranks; choose whiten, l2 or none"
        )
    return value


def _rule_or_list(value: object) -> object:
    if isinstance(value, str) or (
        isinstance(value, list | tuple) and value and all(type(level) is int for level in value)
    ):
        return value
    raise ValueError(f"levels = {value!r}: must be a rule, such as top5, or a list of blocks, such as [5, 11]")


Levels = Annotated[str | tuple[int, ...], BeforeValidator(_rule_or_list)]
TargetNorm = Annotated[FeatureNorm, BeforeValidator(_no_batch_statistics)]


class TargetConfig(Strict):
    """Settings of one teacher's target; null: the value of the method's section.

    weight: of its loss; 0: its features are not used, but its attention may choose the masks.
    levels, target_norm, cls_target: as in the method's section.
    """

    weight: float = Field(1.0, ge=0, le=1e6)
    levels: Levels | None = None
    target_norm: TargetNorm | None = None
    cls_target: bool | None = None


class FeatureConfig(MethodConfig):
    """Common settings of methods that predict features. targets: other values for single teachers, by name.

    adaptor: from the student's width to the teacher's (mlp_norm is MaskAlign's mlp2). levels: of the teacher, as a rule
    (`models.heads.level_weights`) or a list of 0-based blocks with equal weights. target_norm: LayerNorm without affine
    (whiten), unit length (l2) or none, per token. cls_target: predict the class token as well.
    """

    adaptor: Adaptor = "linear"
    levels: Levels = "out"
    target_norm: TargetNorm = "whiten"
    cls_target: bool = False
    targets: dict[str, TargetConfig] = Field(default_factory=dict)


class FeatureTarget(NamedTuple):
    """What a loss uses of one teacher. dim: channels. weight: of its loss. shares: level -> its part of that loss,
    above 0; sum 1. cls: whether the class token is a target.
    """

    dim: int
    weight: float
    shares: dict[int, float]
    norm: FeatureNorm
    cls: bool

    @property
    def needs(self) -> TeacherNeeds:
        return TeacherNeeds(levels=tuple(self.shares))

    def features(self, targets: Targets, level: int, visible_BK: Tensor) -> Tensor:
        """One level's features at the visible patches, class token first if it is a target: float32 [B, (1+)K, C]."""
        features = gather_tokens(targets.levels[level], visible_BK)
        if self.cls:
            features = torch.cat([targets.cls[level][:, None], features], dim=1)
        return normalise_features(features, self.norm)


def feature_targets(config: FeatureConfig, teachers: Mapping[str, TeacherInfo]) -> dict[str, FeatureTarget]:
    """The target of every teacher whose features are used, in the order of `teachers`. Raises UserError for bad
    levels.
    """
    found = {}
    for name, info in teachers.items():
        own = config.targets.get(name, TargetConfig())
        if own.weight:
            shares = _shares(config, own, name, info.depth)
            norm = own.target_norm or config.target_norm
            cls = config.cls_target if own.cls_target is None else own.cls_target
            found[name] = FeatureTarget(info.dim, own.weight, shares, norm, cls)
    return found


def _shares(config: FeatureConfig, own: TargetConfig, name: str, depth: int) -> dict[int, float]:
    levels = config.levels if own.levels is None else own.levels
    try:
        weights = level_weights(levels, depth)
    except ValueError as error:
        place = "levels" if own.levels is None else f"targets.{name}.levels"
        given = levels if isinstance(levels, str) else list(levels)
        raise UserError(f"method.{place} = {given}, teachers.{name}: {error}") from None
    return {level: weight for level, weight in enumerate(weights) if weight}


def check_grid(name: str, info: TeacherInfo, run: RunConfig) -> None:
    """Refuse a teacher whose grid of patches differs from the student's. Raises UserError."""
    if info.grid != run.grid:
        other = f", or teachers.{name}.grid to {run.grid[0]}" if info.resizes else ""
        raise UserError(
            f"teachers.{name} has a {info.grid[0]}x{info.grid[1]} grid at {info.image_size} px, the student "
            f"{run.grid[0]}x{run.grid[1]}; set teachers.{name}.image_size to "
            f"{run.grid[0] * info.image_size // info.grid[0]}{other} so that the grids are equal"
        )


def check_features(config: FeatureConfig, teachers: Mapping[str, TeacherInfo], run: RunConfig) -> None:
    """Refuse targets that do not exist or whose grid differs from the student's. Raises UserError."""
    if not teachers:
        raise UserError(f"method.name = {config.name} needs a teacher and the section teachers is empty; add one there")
    for name in config.targets:
        if name not in teachers:
            raise UserError(f"method.targets.{name}: no such teacher; choose from {', '.join(teachers)}")
    targets = feature_targets(config, teachers)
    if not targets:
        raise UserError("method.targets: every teacher has weight 0, so there is nothing to learn; raise one")
    for name, target in targets.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
            raise UserError(
                f"teachers.{name}: a module is named after the teacher; use letters, digits, _ and -, and no attribute "
                "of torch.nn.ModuleDict"
            )
        check_grid(name, teachers[name], run)
        if target.cls and not teachers[name].has_cls:
            key = f"targets.{name}.cls_target" if len(targets) > 1 else "cls_target"
            raise UserError(
                f"method.cls_target = true, but teachers.{name} has no class token; set method.{key} = false"
            )
