"""The section `log` of a recipe."""

from __future__ import annotations

from pydantic import Field

from mimscale.config.base import Strict


class LogConfig(Strict):
    """every: optimiser steps between log lines. panels: steps between panels of images, 0 = none.

    tensorboard: write the run's event files.
    """

    every: int = Field(20, ge=1)
    panels: int = Field(0, ge=0)
    tensorboard: bool = True
