"""One entry of the section `teachers` of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mimscale.config.base import Strict, numbers_in

SIZES = ("depth", "layers", "embed_dim", "width", "num_heads", "heads", "head_width", "patch_size", "img_size")
MOST_BLOCKS, LARGEST_OPTION = 512, 1 << 20
"""Of `options`: nobody has trained a larger model, and building one would not end."""


class TeacherConfig(Strict):
    """A frozen teacher.

    library: what builds it. model: its name in that library. weights: a local file; null: the file of
        `pretrained`, a tag of the library. pretrained: that tag. sha256: of the file; another one is refused.
        image_size: pixels per side of what it gets; null: that of the student.
    weights: `package:NAME/PATH` is a file inside an installed Python package.
    attention: what attentive masking and AMT's like read: cls, the class token's attention in the last block; norm, the
        norm of each patch's features after the last block (after Zagoruyko & Komodakis 2017), for teachers without a
        class token. null: cls where there is a class token, none elsewhere.
    stride, grid: of convolutional networks, whose one feature map is the target. stride: of this map in pixels of the
        teacher's image (null: 16). grid: side of the grid that the map is resized to, bilinear with antialiasing (null:
        as it is).

    options: keyword arguments for the library's model constructor (e.g. embed_dim, depth of a custom ViT).
    activation: required for open_clip with a local file and no tag, because a file does not record QuickGELU or GELU.
    precision: int8 and fp8 quantise the blocks' linear layers (teachers/quantise.py) and need the extra [fp8].
    compile: torch.compile each block. auto: on a GPU. false is refused there in int8 and fp8, whose eager code takes
        twice the time of bf16.
    shard: experimental. Split the parameters over the ranks and gather them block by block (ZeRO-3), for a teacher that
        does not fit one GPU. Tests on CPUs (gloo) find the same targets as without it; it has not run on a GPU.
    random: keep the seeded random initialisation (a control experiment).
    mean, std, norm_eps: of the checkpoint, if they differ from the library's values for `model` (LayerNorm eps of
        Hugging Face's DINO: 1e-12; weights trained by this package: ImageNet's mean and std).
    """

    library: Literal["timm", "open_clip"]
    model: str
    weights: Path | None = None
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    pretrained: str | None = None
    precision: Literal["fp32", "bf16", "fp16", "int8", "fp8"] = "bf16"
    image_size: int | None = Field(None, ge=8, le=8192)
    activation: Literal["gelu", "quickgelu"] | None = None
    random: bool = False
    compile: Literal["auto"] | bool = "auto"
    shard: bool = False
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    norm_eps: float | None = Field(None, gt=0, le=1)
    attention: Literal["cls", "norm"] | None = None
    stride: int | None = Field(None, ge=2, le=64)
    grid: int | None = Field(None, ge=1, le=1024)
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _shardable(self) -> TeacherConfig:
        if self.shard and (self.compile is True or self.storage != self.precision):
            other = "compile = true" if self.compile is True else f"precision = {self.precision}"
            raise ValueError(f"shard = true with {other}: not supported together; use one or the other")
        return self

    @field_validator("options")
    @classmethod
    def _of_a_model(cls, options: dict[str, Any]) -> dict[str, Any]:
        for place, number in numbers_in(options):
            most = MOST_BLOCKS if place.split(".")[0] in ("depth", "layers") else LARGEST_OPTION
            if abs(number) > most:
                raise ValueError(f"{place} = {number:g}: must be at most {most:,}; correct it")
            if number < (1 if place in SIZES else 0):
                raise ValueError(f"{place} = {number:g}: must be {int(place in SIZES)} or more; correct it")
        return options

    @field_validator("std")
    @classmethod
    def _positive(cls, std: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if std is not None and not all(1e-6 <= value <= 1e6 for value in std):
            raise ValueError(f"{list(std)}: pixels are divided by each of them, so it must be from 1e-6 to 1e6")
        return std

    @property
    def storage(self) -> Literal["fp32", "bf16", "fp16"]:
        """Data type of every tensor that is not quantised."""
        return "bf16" if self.precision == "int8" or self.precision == "fp8" else self.precision
