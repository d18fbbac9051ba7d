"""The section `init` of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from mimscale.config.base import Strict


class InitConfig(Strict):
    """Weights that a run starts from.

    weights: a run folder (its newest checkpoint), a checkpoint folder, or a file, also one of an official release.
    sha256: of the file, or of a checkpoint's manifest.json; without it what is found at the first start is kept.
    part: student leaves decoder and heads at their random start; method takes everything, from the same method.
    """

    weights: Path
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    part: Literal["student", "method"] = "student"
