"""The guard's limits and its counting, on plain numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mimscale.data.order import batch_of, jumped
from mimscale.fault_tolerance.activation_magnitudes import largest, magnitudes, suspect
from mimscale.fault_tolerance.config import GuardConfig
from mimscale.fault_tolerance.step_guard import StepGuard

CPU = torch.device("cpu")


def accepted(guard: StepGuard, *losses: float) -> list[bool]:
    return [math.isfinite(float(guard.check_loss(torch.tensor(loss)))) for loss in losses]


def test_a_spike_is_checked_against_the_losses_before_it() -> None:
    guard = StepGuard(GuardConfig(loss_spike=5.0, warmup=50), 1, CPU)
    assert all(accepted(guard, *(1.0 + 0.01 * (i % 3) for i in range(60))))
    assert accepted(guard, 1.08, 1.5, math.nan, math.inf, 1.0) == [True, False, False, False, True]
    assert accepted(guard, *(1.0 - 0.005 * i for i in range(100))) == [True] * 100  # falling is never a spike
    with_warmup = StepGuard(GuardConfig(loss_spike=5.0, warmup=50), 1, CPU)
    assert accepted(with_warmup, 1.0, 1.0, 100.0, math.nan) == [True, True, True, False]
    off = StepGuard(GuardConfig(loss_spike=0.0, warmup=1), 1, CPU)
    assert accepted(off, 1.0, 1.0, 1e9, math.nan) == [True, True, True, False]


def test_the_loss_of_a_step_is_the_mean_of_its_micro_steps() -> None:
    """Checked once, before the last backward pass; what went backward before is discarded with it."""
    guard = StepGuard(GuardConfig(), 2, CPU)
    assert accepted(guard, math.nan, 1.0, 1.0, 1.0) == [False, False, True, True]
    assert guard.cause()["bad_micro_steps"] == []
    loss = torch.tensor(2.0, requires_grad=True)
    guard.check_loss(torch.tensor(math.inf))
    guard.check_loss(loss).backward()
    assert loss.grad is not None and math.isnan(float(loss.grad))
    assert guard.cause() == {
        "why": "the loss is not finite",
        "loss": math.inf,
        "limit": math.inf,
        "bad_micro_steps": [0],
    }


def test_the_micro_steps_that_spike_are_suspected() -> None:
    guard = StepGuard(GuardConfig(loss_spike=5.0, warmup=5), 2, CPU)
    accepted(guard, *[1.0] * 20)
    assert accepted(guard, 1.0, 100.0) == [True, False]
    assert guard.cause()["why"] == "the loss is above its limit" and guard.cause()["bad_micro_steps"] == [1]


def test_a_guard_goes_on_where_it_was_saved() -> None:
    config = GuardConfig(loss_spike=3.0, warmup=5, grad_spike=4.0, every=1)
    one, losses = StepGuard(config, 1, CPU), [1.0 + 0.1 * math.sin(i) for i in range(40)]
    accepted(one, *losses[:20])
    one.observe_norm(2.0)
    two = StepGuard(config, 1, CPU)
    two.load(one.dump())
    assert accepted(one, *losses[20:]) == accepted(two, *losses[20:]) and one.dump() == two.dump()


def test_the_limit_of_gradients_follows_their_usual_size() -> None:
    guard = StepGuard(GuardConfig(grad_spike=4.0, warmup=3, every=1), 1, CPU)
    assert guard.clip(0.0) == 0.0 and guard.clip(1.0) == 1.0
    for norm in (2.0, 2.0, 2.0, math.inf, math.nan):
        guard.observe_norm(norm)
    assert guard.clip(0.0) == 8.0 and guard.clip(1.0) == 1.0 and guard.clip(100.0) == 8.0
    guard.observe_norm(1e9)  # counts as the limit that it was scaled down to
    assert guard.clip(0.0) < 16.0


@pytest.mark.parametrize(
    ("scale", "back"), [(None, [False, False, True]), (32.0, [False, False, True]), (16.0, [True] * 3)]
)
def test_a_full_row_or_a_collapsed_loss_scale_sends_back(scale: float | None, back: list[bool]) -> None:
    guard = StepGuard(GuardConfig(skips=3), 1, CPU)
    assert [guard.update(True, scale) for _ in range(3)] == back
    assert not guard.update(False, scale) and guard.streak == 0
    assert not StepGuard(GuardConfig(skips=0), 1, CPU).update(True, scale)


def test_jumps_never_lead_to_a_batch_that_was_seen() -> None:
    """Back from step 13 to 9, then again from 11 to 8: what stood between is left out, and so is the first window."""
    once = jumped((), 9, 13)
    assert [batch_of(t, once) for t in range(7, 12)] == [7, 8, 13, 14, 15]
    twice = jumped(once, 8, 11)
    assert [batch_of(t, twice) for t in range(6, 11)] == [6, 7, 15, 16, 17]
    later = jumped(twice, 20, 22)
    assert [batch_of(t, later) for t in (7, 8, 19, 20)] == [7, 15, 26, 29]


def test_the_layer_that_grew_is_named() -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(4, 4), nn.Linear(4, 4)
    net = nn.Sequential(first, nn.ReLU(), last)
    x = torch.ones(2, 4)
    usual = magnitudes(net, lambda: net(x))
    assert list(usual) == ["0", "1", "2"]
    with torch.no_grad():
        last.weight.mul_(100)
    assert suspect(magnitudes(net, lambda: net(x)), usual).startswith("2 grew the most")
    with torch.no_grad():
        first.bias.fill_(math.nan)
    assert "0 is the first layer whose output is not finite" in suspect(magnitudes(net, lambda: net(x)), usual)
    assert math.isnan(largest([{"a": 1.0}, {"a": math.nan}])["a"])
