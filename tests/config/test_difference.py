"""What differs between recipes."""

from __future__ import annotations

from mimscale.config.difference import ABSENT, differences


def test_only_keys_that_differ_in_the_order_of_sections() -> None:
    one = {"seed": 0, "optim": {"lr": 1e-4, "betas": [0.9, 0.95]}, "log": {"every": 20}}
    two = {"seed": 0, "log": {"every": 20}, "optim": {"lr": 2e-4, "betas": [0.9, 0.95], "momentum": 0.9}}
    three = {**one, "log": {"every": 5}}
    assert differences([one, two, three]) == {
        "optim.lr": [1e-4, 2e-4, 1e-4],
        "optim.momentum": [ABSENT, 0.9, ABSENT],
        "log.every": [20, 20, 5],
    }
    assert list(differences([one, two, three])) == ["optim.lr", "optim.momentum", "log.every"]
    assert differences([one, one]) == differences([one]) == differences([]) == {}


def test_a_section_that_is_left_out_null_or_empty_is_the_same() -> None:
    assert differences([{"evals": None, "teachers": {}}, {}]) == {}
    assert differences([{"evals": None}, {"evals": {"every": 3}}]) == {"evals.every": [ABSENT, 3]}
    assert differences([{"teachers": {}}, {"teachers": {"clip": {"model": "x"}}}]) == {
        "teachers.clip.model": [ABSENT, "x"]
    }
    assert differences([{"a": 0}, {}]) == {"a": [0, ABSENT]}  # a zero is a value
