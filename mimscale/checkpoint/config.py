"""The section `checkpoint` of a recipe."""

from __future__ import annotations

from pydantic import Field

from mimscale.config.base import Strict


class CheckpointConfig(Strict):
    """every: optimiser steps between saves, 0 = only at the end. keep: newest checkpoints that stay on disk.

    keep_every: those at multiples of this step stay for good, 0 = none. patience_s: how long a write that fails (a full
    disk, a quota, an outage) is tried again before this save is given up and the training goes on. wait_s: how long a
    step that wants to save waits for a save that is still being written, before it goes on without.
    """

    every: int = Field(1000, ge=0)
    keep: int = Field(2, ge=1)
    keep_every: int = Field(0, ge=0)
    patience_s: float = Field(120.0, ge=0)
    wait_s: float = Field(10.0, ge=0)
