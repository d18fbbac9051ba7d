"""What counts of a run's log: later lines, whole lines, and the time in which it ran."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mimscale.report import history
from tests.report import folders


def test_of_steps_that_were_redone_the_later_lines_count(tmp_path: Path) -> None:
    folders.eventful(tmp_path)
    found = history.read(tmp_path)
    assert [row.step for row in found.rows] == list(range(1, 61))
    losses = [row.values["loss"] for row in found.rows]
    assert losses == [1.0] * 20 + [0.5] * 20 + [0.25] * 20
    assert [[row.step for row in gone] for gone in found.discarded] == [list(range(21, 31)), list(range(41, 51))]
    assert {row.values["loss"] for gone in found.discarded for row in gone} == {2.0, 3.0}
    kinds = [event.kind for event in found.events]
    wanted = ["start", "saved", "restart", "saved", "skipped", "skipped", "rollback", "slow_rank", "evals"]
    assert kinds == wanted
    assert found.events[6].back_to == 40 and "to 40" in found.events[6].text


def test_a_pause_between_launches_does_not_count_as_time(tmp_path: Path) -> None:
    run = folders.Folder(tmp_path)
    run.launch()
    run.step(1)
    run.now_s += 86_400
    run.launch(step=1)
    run.step(2)
    found = history.read(tmp_path)
    assert [row.hours for row in found.rows] == pytest.approx([0.01, 0.02])


def test_without_launches_a_step_that_comes_again_counts_the_second_time(tmp_path: Path) -> None:
    run = folders.Folder(tmp_path)
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 4.0)):
        run.step(step, loss=loss)
    found = history.read(tmp_path)
    assert [(row.step, row.values["loss"]) for row in found.rows] == [(1, 1.0), (2, 4.0)]


def test_a_torn_last_line_and_lines_that_are_none_are_left_out(tmp_path: Path) -> None:
    run = folders.Folder(tmp_path)
    run.step(1, grad_norm=None)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n\xff\n{"step": "x"}\n{"step": true}\n\n{"step": 2, "loss": NaN, "t": {}}\n{"step": 3, "lo')
    found = history.read(tmp_path)
    assert [row.step for row in found.rows] == [1, 2] and found.torn and found.unreadable == 4
    assert math.isnan(found.rows[0].values["grad_norm"]) and "loss" not in found.rows[1].values


def test_evaluations_of_discarded_steps_do_not_count(tmp_path: Path) -> None:
    run = folders.Folder(tmp_path)
    run.launch()
    for step, knn in ((10, 1.0), (20, 2.0)):
        run.step(step)
        run.event("evals", at=step, knn=knn, seconds=0.1)
    run.launch(step=10)
    assert [(row.step, row.values) for row in history.read(tmp_path).evals] == [(10, {"evals/knn": 1.0})]
