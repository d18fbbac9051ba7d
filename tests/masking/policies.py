"""A masking policy by itself, on a small grid."""

from __future__ import annotations

from typing import Any, cast

import torch

from mimscale.masking.base import Masking
from mimscale.methods.base import MaskedConfig, masking_class
from mimscale.types import Batch, Targets, TeacherInfo
from tests.golden import batch_of, run_config


def teacher(side: int = 4, has_cls: bool = True, name: str = "t") -> TeacherInfo:
    return TeacherInfo(name, dim=24, depth=3, grid=(side, side), image_size=16 * side, has_cls=has_cls)


def policy(image_size: int = 64, patch: int = 16, *teachers: TeacherInfo, **section: Any) -> Masking:
    """`method.masking` of a MAE run."""
    student = {"width": 32, "depth": 2, "heads": 2, "patch": patch}
    run = run_config({"name": "mae", "masking": section}, student, image_size)
    config, infos = cast(MaskedConfig, run.method), {info.name: info for info in teachers}
    masking_class(config).check(config.masking, run, infos)
    return masking_class(config)(config.masking, run, infos)


def batch(noise: torch.Tensor | None = None, count: int = 1) -> Batch:
    images = torch.zeros(count if noise is None else len(noise), 3, 8, 8)
    return batch_of(images) if noise is None else batch_of(images, mask=noise)


def attention_targets(attention: torch.Tensor, name: str = "t") -> dict[str, Targets]:
    return {name: Targets({}, {}, attention)}
