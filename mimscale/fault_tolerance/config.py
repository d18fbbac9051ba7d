"""The sections `guard` and `watchdog` of a recipe."""

from __future__ import annotations

from pydantic import Field

from mimscale.config.base import Strict


class GuardConfig(Strict):
    """Steps that must not reach the weights; the mechanism stands in resilience/guard.py. 0 switches a rule off.

    loss_spike: deviations above the mean of the accepted losses from which a step is skipped. grad_spike: multiple of
    the usual gradient norm to which a larger one is scaled down. warmup: steps before either is applied. every: steps
    between readings of the norm. skips: bad steps in a row after which the run goes back to the checkpoint before them
    and jumps over their samples. margin: steps before these whose samples are jumped over too. rollbacks: how often,
    before the run ends with a report. loss_scale_floor: a loss scale (fp16) at which a skipped step counts as a full
    row.
    """

    loss_spike: float = Field(10.0, ge=0)
    grad_spike: float = Field(20.0, ge=0)
    warmup: int = Field(200, ge=1)
    every: int = Field(20, ge=1)
    skips: int = Field(10, ge=0)
    margin: int = Field(20, ge=0)
    rollbacks: int = Field(3, ge=0)
    loss_scale_floor: float = Field(16.0, ge=1)


class WatchdogConfig(Strict):
    """stall_s: seconds without a step after which a rank writes down what it does and ends itself, 0 = off.

    startup_s: the same before the first step. every: steps between comparisons of the ranks, 0 = none.
    """

    stall_s: float = Field(900.0, ge=0)
    startup_s: float = Field(3600.0, ge=0)
    every: int = Field(100, ge=0)
