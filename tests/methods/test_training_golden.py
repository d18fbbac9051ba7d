"""The teacher and the yardstick of the official training runs; tests/engine/test_goldens.py repeats the runs."""

from __future__ import annotations

import pytest

from tests import golden
from tests.golden import close
from tests.methods import training_golden
from tests.methods.training_golden import clip_teacher


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
    almost = {name: end + 5e-4 * (end - t.start[name]) for name, end in t.end.items()}
    with pytest.raises(AssertionError):
        t.check_weights(almost)
    t.check_weights(t.end)
