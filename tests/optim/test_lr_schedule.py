"""The curves that a recipe can choose, against the official programs' and at their edges."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from mimscale.config.recipes import validate
from mimscale.errors import UserError
from mimscale.optim.config import ScheduleConfig
from mimscale.optim.lr_schedule import cosine_at_step, lr_at_step
from tests import golden


def curve_of(**values: Any) -> ScheduleConfig:
    return ScheduleConfig(**{"global_batch": 512, "lr_batch": 512, "base_lr": 1.0, **values})


@pytest.mark.parametrize("kind", ["multistep", "cosine"])
def test_golden_curve_simmim(kind: str) -> None:
    g = golden.load("simmim_lr_schedule")
    c = g.config[kind]
    curve = curve_of(
        kind={"cosine": "timm_cosine"}.get(kind, kind),
        **{name: c[name] for name in ("epochs", "warmup_epochs", "base_lr", "warmup_lr", "min_lr", "gamma")},
        milestones=tuple(c["milestone_epochs"]),
    )
    total = c["epochs"] * c["steps_per_epoch"]
    ours = [lr_at_step(curve, step, c["steps_per_epoch"], total) for step in range(total + 1)]
    golden.rates_close(ours[:total], g[f"{kind}/lr_used"].tolist())
    golden.rates_close(ours[1:], g[f"{kind}/lr_after_step_update"].tolist())
    assert ours[0] == ours[1] == c["warmup_lr"]


@pytest.mark.parametrize("name", ["mff_train_dev", "pixmim_train_dev"])
def test_golden_curve_openmmlab(name: str) -> None:
    g = golden.load(name)
    c = g.config
    curve = curve_of(
        kind="openmmlab_cosine",
        base_lr=c["peak_lr"],
        epochs=c["epochs"],
        warmup_epochs=c["warmup_epochs"],
        warmup_start_factor=c["start_factor"],
    )
    steps = c["optsteps_per_epoch"]
    ours = [lr_at_step(curve, step, steps, c["epochs"] * steps) for step in range(c["micro_steps"])]
    golden.rates_close(ours, g["lr_per_optstep"].tolist())
    warmup = c["warmup_epochs"] * steps
    assert ours[0] == c["start_factor"] * c["peak_lr"] and ours[warmup - 1] == ours[warmup] == c["peak_lr"]


def test_openmmlab_warm_up_of_two_steps_and_of_one() -> None:
    """Two steps: the first at the start factor, the second at the peak. One step stays at the start factor."""
    two = curve_of(kind="openmmlab_cosine", epochs=4, warmup_epochs=2, warmup_start_factor=0.25, min_lr=0.5)
    assert [lr_at_step(two, step, 1, 4) for step in range(6)] == pytest.approx([0.25, 1, 1, 0.75, 0.5, 0.5])
    one = curve_of(kind="openmmlab_cosine", epochs=4, warmup_epochs=1, warmup_start_factor=0.25)
    assert [lr_at_step(one, step, 1, 4) for step in range(2)] == [0.25, 1]


def test_the_default_is_maes_curve_to_the_bit() -> None:
    curve = curve_of(epochs=7.5, warmup_epochs=1.3, min_lr=1e-5, base_lr=1.5e-4)
    for step in range(40):
        maes = cosine_at_step(step, 5, peak=curve.peak_lr, min_lr=1e-5, warmup_epochs=1.3, epochs=7.5)
        assert lr_at_step(curve, step, 5, 38) == maes


def test_length_in_steps() -> None:
    """A run of given steps has its epochs from the data; a cosine ends with the run."""
    by_steps, by_epochs = curve_of(steps=20, warmup_epochs=1), curve_of(epochs=4, warmup_epochs=1)
    assert [lr_at_step(by_steps, t, 5, 20) for t in range(20)] == [lr_at_step(by_epochs, t, 5, 20) for t in range(20)]
    timm = curve_of(kind="timm_cosine", steps=20, min_lr=0.25)
    assert lr_at_step(timm, 21, 5, 20) == lr_at_step(timm, 50, 5, 20) == 0.25 < lr_at_step(timm, 20, 5, 20)


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    for values in (
        {"kind": "timm_cosine"},
        {"kind": "multistep", "milestones": (2.0,)},
        {"kind": "openmmlab_cosine"},
        {},
    ):
        assert lr_at_step(curve_of(epochs=4, **values), 0, 5, 20) == 1.0


def test_several_milestones_multiply() -> None:
    curve = curve_of(kind="multistep", epochs=9, milestones=(2.0, 4.5, 6.0), gamma=0.5)
    rates = [lr_at_step(curve, step, 4, 36) for step in range(36)]
    changes = [step for step, (a, b) in enumerate(pairwise(rates), start=1) if a != b]
    assert changes == [9, 19, 25] and rates[-1] == 0.5**3  # one step after the milestones


def test_a_warm_up_may_start_above_zero_in_every_curve() -> None:
    for kind in ("cosine", "timm_cosine"):
        curve = curve_of(kind=kind, epochs=4, warmup_epochs=2, warmup_lr=0.5)
        rates = [lr_at_step(curve, step, 5, 20) for step in range(10)]
        assert rates[0] == 0.5 and all(a <= b for a, b in pairwise(rates)) and rates[-1] < 1


@pytest.mark.parametrize(
    ("values", "fragment"),
    [
        ({"kind": "multistep"}, r"schedule: milestones = \[\] with kind = multistep"),
        ({"milestones": [3]}, r"milestones = \[3.0\] with kind = cosine"),
        ({"kind": "multistep", "milestones": [3, 2]}, r"milestones = \[3.0, 2.0\]: must rise"),
        ({"kind": "multistep", "milestones": [1], "warmup_epochs": 2}, "inside the warm-up of 2 epochs"),
        ({"kind": "multistep", "milestones": [1], "min_lr": 0.1}, "min_lr = 0.1 with kind = multistep"),
        ({"kind": "openmmlab_cosine", "warmup_lr": 1e-6}, "warmup_lr = 1e-06 with kind = openmmlab_cosine: give"),
        ({"warmup_start_factor": 1e-4}, "warmup_start_factor = 0.0001 with kind = cosine: only openmmlab_cosine"),
        ({"kind": "linear"}, "schedule.kind = 'linear'"),
    ],
)
def test_refusals(values: dict[str, Any], fragment: str) -> None:
    schedule = {"global_batch": 2, "epochs": 4, "base_lr": 1e-3, **values}
    run = {"data": {"shards": "none"}, "student": {"size": "tiny"}, "method": {"name": "mae"}, "schedule": schedule}
    with pytest.raises(UserError, match=fragment) as refused:
        validate(run, source="test")
    assert "\n" not in str(refused.value)
