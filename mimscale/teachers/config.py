"""One entry of the section `teachers` of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from mimscale.config.base import Strict


class TeacherConfig(Strict):
    """A frozen teacher. `weights` is a local file; without it the file of the library's tag `pretrained` is used.

    options: keyword arguments for the library's model constructor (e.g. embed_dim, depth of a custom ViT).
    activation: required for open_clip with a local file and no tag: a file cannot say whether it wants QuickGELU.
    precision: int8 and fp8 quantise the blocks' linear layers (teachers/quantise.py) and need the extra [fp8].
    compile: torch.compile each block. shard: parameters are split over the ranks and gathered block by block (ZeRO-3),
        for a teacher that one GPU cannot hold.
    random: leave the weights at their seeded random initialisation (a control, not a teacher).
    mean, std, norm_eps: facts of a checkpoint where they differ from what the library says of `model` (LayerNorm eps of
    Hugging Face's DINO: 1e-12; weights trained by this package: ImageNet's mean and std).
    """

    library: Literal["timm", "open_clip"]
    model: str
    weights: Path | None = None
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    pretrained: str | None = None
    precision: Literal["fp32", "bf16", "fp16", "int8", "fp8"] = "bf16"
    image_size: int | None = Field(None, ge=8)
    activation: Literal["gelu", "quickgelu"] | None = None
    random: bool = False
    compile: bool = False
    shard: bool = False
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    norm_eps: float | None = Field(None, gt=0)
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _shardable(self) -> TeacherConfig:
        if self.shard and (self.compile or self.storage != self.precision):
            other = "compile = true" if self.compile else f"precision = {self.precision}"
            raise ValueError(f"shard = true with {other}: parameters are gathered as they are; use one or the other")
        return self

    @property
    def storage(self) -> Literal["fp32", "bf16", "fp16"]:
        """The number format of every tensor that is not quantised."""
        return "bf16" if self.precision == "int8" or self.precision == "fp8" else self.precision
