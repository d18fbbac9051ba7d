"""The section `student` of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from mimscale.config.base import Fraction, Strict

STUDENT_SIZES = {  # width, depth, heads
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}


class StudentConfig(Strict):
    """The encoder that is trained, a plain ViT by default. size: sets width, depth and heads; without it give all
    three. width: channels; by default those of `size`. depth: number of blocks, likewise. heads: attention heads
    of each block, likewise. patch:
    side of a patch in pixels. mlp_ratio: width of the MLP's hidden layer, as a multiple of `width`. drop_path: rate of
    stochastic depth in the last block; it rises linearly from 0 in the first.
    """

    size: Literal["tiny", "small", "base", "large", "huge"] | None = None
    width: int = Field(0, ge=0, le=2**16)
    depth: int = Field(0, ge=0, le=1024)
    heads: int = Field(0, ge=0, le=2**12)
    patch: int = Field(16, ge=1, le=1024)
    mlp_ratio: float = Field(4.0, gt=0, le=256)
    drop_path: Fraction = 0.0

    @model_validator(mode="before")
    @classmethod
    def _fill_from_size(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and isinstance(values.get("size"), str) and values["size"] in STUDENT_SIZES:
            named = dict(zip(("width", "depth", "heads"), STUDENT_SIZES[values["size"]], strict=True))
            return {**named, **values}
        return values

    @model_validator(mode="after")
    def _complete(self) -> StudentConfig:
        if not (self.width and self.depth and self.heads):
            raise ValueError("needs size (tiny, small, base, large, huge) or all of width, depth, heads")
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width = {self.width} must be divisible by heads = {self.heads} and by 4")
        if int(self.width * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio = {self.mlp_ratio} of width = {self.width} is less than one channel; raise it")
        return self
