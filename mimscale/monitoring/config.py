"""The section `log` of a recipe."""

from __future__ import annotations

from pydantic import Field

from mimscale.config.base import Strict


class ProfileConfig(Strict):
    """at: the first step that torch.profiler records. steps: how many. ranks: the first so many write their traces."""

    at: int = Field(ge=1)
    steps: int = Field(3, ge=1, le=1000)
    ranks: int = Field(1, ge=1)


class LogConfig(Strict):
    """every: optimiser steps between log lines. panels: steps between panels of images, 0 = none. profile: a window of
    steps that torch.profiler records, none by default.
    """

    every: int = Field(20, ge=1)
    panels: int = Field(0, ge=0)
    tensorboard: bool = True
    profile: ProfileConfig | None = None
