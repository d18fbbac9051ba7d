"""The official training runs, repeated with our method, groups and curve, and torch's AdamW."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mimscale.optim import parameter_groups
from mimscale.schedule import lr
from tests import golden
from tests.golden import close
from tests.methods import training_golden
from tests.methods.training_golden import TrainingGolden, clip_teacher


@pytest.mark.parametrize("build", [training_golden.mae, training_golden.maskalign])
def test_training_golden(build: Callable[[], TrainingGolden]) -> None:
    t = build()
    optim, schedule = t.run.optim, t.run.schedule
    groups = parameter_groups(
        t.method,
        weight_decay=optim.weight_decay,
        no_weight_decay=t.method.no_weight_decay(),
        layer_of=t.method.layer_of,
    )
    decayed = {name for group in groups for name in group["names"] if group["weight_decay"]}
    undecayed = {name for group in groups for name in group["names"] if not group["weight_decay"]}
    assert (decayed, undecayed) == (t.decayed, t.undecayed)
    assert decayed | undecayed == {name for name, _ in t.method.named_parameters()}

    adamw = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps)
    for step, (batch, targets) in enumerate(zip(t.batches, t.targets, strict=True)):
        rate = lr(
            step,
            t.steps_per_epoch,
            peak=schedule.peak_lr,
            min_lr=schedule.min_lr,
            warmup_epochs=schedule.warmup_epochs,
            epochs=schedule.epochs or 0,
        )
        assert rate == pytest.approx(t.lrs[step], rel=1e-9, abs=1e-15)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.zero_grad()
        loss = t.method(batch, targets)["loss"]
        loss.backward()
        assert loss.item() == pytest.approx(t.losses[step], rel=golden.LOSS)
        if t.norms:
            norm = torch.stack([p.grad.norm() for p in t.method.parameters() if p.grad is not None]).norm()
            assert norm.item() == pytest.approx(t.norms[step], rel=1e-5)
        adamw.step()
    t.check_weights(t.method.state_dict())


@pytest.mark.parametrize("name", ["default", "sum_mlp", "simple_random"])
def test_teacher_of_the_training_run(name: str) -> None:
    g = golden.load(f"maskalign_{name}_dev")
    hidden, attention = clip_teacher(g.part("state"), g.config["teacher_heads"], g["input/images"])
    close(hidden, g["teacher/hidden_states"], 2e-5)
    close(attention, g["teacher/cls_attention"])


def test_a_wrong_move_is_seen() -> None:
    t = training_golden.mae()
    with pytest.raises(AssertionError, match="in a move of"):
        t.check_weights(t.start)
    almost = {name: end + 0.05 * (end - t.start[name]) for name, end in t.end.items()}
    with pytest.raises(AssertionError):
        t.check_weights(almost)
    t.check_weights(t.end)
