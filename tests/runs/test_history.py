"""What counts of a run's log: later lines, whole lines, and the time in which it ran."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mimscale.runs import history
from mimscale.runs.summary import summary_of
from tests.report import folders


def test_of_steps_that_were_redone_the_later_lines_count(tmp_path: Path) -> None:
    folders.eventful(tmp_path)
    found = history.read(tmp_path)
    assert [row.step for row in found.rows] == list(range(1, 61))
    losses = [row.values["loss"] for row in found.rows]
    assert losses == [1.0] * 20 + [0.5] * 20 + [0.25] * 20
    assert [[row.step for row in gone] for gone in found.discarded] == [list(range(21, 31)), list(range(41, 51))]
    assert (summary_of(tmp_path).step, summary_of(tmp_path).loss) == (60, 0.25)
    assert {row.values["loss"] for gone in found.discarded for row in gone} == {2.0, 3.0}
    kinds = [event.kind for event in found.events]
    wanted = ["start", "saved", "restart", "saved", "skipped", "skipped", "rollback", "slow_rank", "evals"]
    assert kinds == wanted
    assert "to 40" in found.events[6].text


def test_a_pause_between_launches_does_not_count_as_time(tmp_path: Path) -> None:
    run = folders.Folder(tmp_path)
    run.launch()
    run.step(1)
    run.now_s += 86_400
    run.launch(step=1)
    run.step(2)
    found = history.read(tmp_path)
    assert [row.hours for row in found.rows] == pytest.approx([0.01, 0.02])


@pytest.mark.parametrize("jump_s", [-86_400.0, 86_400.0])
def test_a_clock_that_is_set_neither_adds_hours_nor_reorders_lines(tmp_path: Path, jump_s: float) -> None:
    run = folders.Folder(tmp_path)
    run.launch()
    for step in range(1, 5):
        run.wrong_s = jump_s if step == 3 else 0.0  # set, and set back
        run.step(step)
    run.event("saved", at=4)
    run.launch(step=4)  # before the next step its clock jumps
    run.wrong_s = jump_s
    run.step(5)
    run.event("stopped", at=5, reason="SIGTERM")
    found = history.read(tmp_path)
    assert [row.step for row in found.rows] == [1, 2, 3, 4, 5] and found.discarded == []
    assert [row.hours for row in found.rows] == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])
    assert found.hours == pytest.approx(0.05)
    assert [(event.kind, event.step) for event in found.events] == [
        ("start", 0),
        ("saved", 4),
        ("restart", 4),
        ("stopped", 5),
    ]
    assert (summary_of(tmp_path).status, summary_of(tmp_path).step) == ("stopped", 5)


def test_what_a_launch_went_back_behind_counts_before_it_has_logged_anything(tmp_path: Path) -> None:
    run = folders.Folder(tmp_path)
    run.launch()
    for step in (2, 4, 6, 8):
        run.step(step)
    run.launch(step=5)
    assert [row.step for row in history.read(tmp_path).rows] == [2, 4]
    assert (summary_of(tmp_path).step, summary_of(tmp_path).total_steps) == (4, 60)
    run.event("rollback", at=5, to=3)
    assert summary_of(tmp_path).step == 2 and [row.step for row in history.read(tmp_path).rows] == [2]


def test_two_evaluations_of_one_step_both_count(tmp_path: Path) -> None:
    """Of a fine-tuning: `evals` and `evals.top1_epochs`."""
    run = folders.Folder(tmp_path)
    run.launch()
    run.step(10)
    run.event("evals", at=10, knn=1.0, seconds=0.1)
    run.event("evals", at=10, top1=2.0, seconds=0.1)
    assert [(row.step, row.values) for row in history.read(tmp_path).evals] == [
        (10, {"evals/knn": 1.0, "evals/top1": 2.0})
    ]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "evals.jsonl").write_text("".join(line for line in lines if '"evals"' in line))
    assert [(one.name, one.value) for one in summary_of(tmp_path).figures] == [("knn", 1.0), ("top1", 2.0)]


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
    assert [row.step for row in found.rows] == [1, 2] and found.unreadable == 4
    assert math.isnan(found.rows[0].values["grad_norm"]) and "loss" not in found.rows[1].values


def test_evaluations_of_discarded_steps_do_not_count(tmp_path: Path) -> None:
    run = folders.Folder(tmp_path)
    run.launch()
    for step, knn in ((10, 1.0), (20, 2.0)):
        run.step(step)
        run.event("evals", at=step, knn=knn, seconds=0.1)
    run.launch(step=10)
    assert [(row.step, row.values) for row in history.read(tmp_path).evals] == [(10, {"evals/knn": 1.0})]
