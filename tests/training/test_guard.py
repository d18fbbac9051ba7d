"""Bad steps in the real trainer: skipped, jumped over, and the run's last word when they do not end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mimscale.checkpoint import format as checkpoint
from tests import ranks

pytestmark = [pytest.mark.multi, pytest.mark.slow]
GUARD = {"skips": 3, "margin": 1, "rollbacks": 1}


def train(count: int, folder: Path, recipe: Path, faults: dict[str, Any], *overrides: str, code: int = 0) -> str:
    folder.mkdir(exist_ok=True)
    planted = folder.with_suffix(".json")
    planted.write_text(json.dumps(faults))
    words: list[str | Path] = ["tests.faulty", planted, "train", recipe, *overrides, "--run-dir", folder]
    done = ranks.run(count, *words, check=False)
    assert done.returncode == code, done.stderr[-4000:]
    return done.stderr


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in ranks.lines(run_dir) if line.get("event") == name]


def test_a_row_of_bad_steps_is_jumped_over_by_any_number_of_ranks(shards: Path, tmp_path: Path) -> None:
    """Batches 10 to 12 spoil their steps: back to the checkpoint of step 8, on over batch 8, then 13 and so on."""
    recipe = ranks.recipe(tmp_path, shards, guard=GUARD, schedule={"steps": 16})
    bad = {"images": {10: None, 11: 1e30, 12: None}, "rank": 0}
    one, two = tmp_path / "one", tmp_path / "two"
    train(1, one, recipe, bad)
    train(2, two, recipe, bad)
    for run_dir in (one, two):
        (back,) = events(run_dir, "rollback")
        assert {k: back[k] for k in ("at", "to", "jump_at", "batches")} == {
            "at": 13, "to": 8, "jump_at": 9, "batches": [9, 13]}  # fmt: skip
        assert [skip["at"] for skip in events(run_dir, "skipped")] == [11, 12, 13]
        assert all(len(skip["keys"]) >= 8 for skip in events(run_dir, "skipped"))
        state = ranks.meta(run_dir)["state"]
        assert (state["step"], state["samples"], state["jumps"], state["rollbacks"]) == (16, 256, [[9, 4]], 1)
        left_out = [json.loads(line) for line in (run_dir / "left_out.jsonl").read_text().splitlines()]
        assert [line["batch"] for line in left_out] == [9, 10, 11, 12] and len(left_out[0]["keys"]) == 16
        assert set(events(run_dir, "skipped")[0]["keys"]) <= set(left_out[1]["keys"])
    assert ranks.difference(one, two) < 1e-4  # fp32 rounding over 16 steps

    resumed = tmp_path / "resumed"
    ranks.cut_back(two, resumed, 12)  # a checkpoint that was saved after the jump
    train(2, resumed, recipe, bad)
    assert ranks.identical(resumed, two) and not events(resumed, "rollback")[1:]
    before = tmp_path / "before"
    ranks.cut_back(two, before, 8)  # as if killed right after going back: it meets the bad steps and decides alike
    train(2, before, recipe, bad)
    assert ranks.identical(before, two)


@pytest.mark.parametrize("ds_config", ["cpu_zero0_fp32", "cpu_zero2_fp16", "cpu_zero3_bf16"])
def test_a_run_that_cannot_be_saved_ends_with_a_report(ds_config: str, shards: Path, tmp_path: Path) -> None:
    recipe = ranks.recipe(tmp_path, shards, guard=GUARD)
    bad = {"images": {str(batch): 1e30 for batch in range(5, 60)}}
    run_dir = tmp_path / "run"
    text = train(1, run_dir, recipe, bad, f"engine.ds_config={ds_config}", code=4)
    last = text.strip().splitlines()[-1]
    assert "3 bad steps in a row after 1 roll-backs: the loss is not finite" in last
    assert "is the first layer whose output is not finite" in last
    assert ("would go on in bf16" in last) == ds_config.endswith("fp16")
    report = json.loads((run_dir / "guard.json").read_text(), parse_constant=pytest.fail)
    assert report["rollbacks"] == 1 and len(report["incidents"]) == 6
    newest = checkpoint.newest(run_dir)
    assert newest is not None and checkpoint.step_of(newest) == 4
    if ds_config.endswith("fp16"):  # the flag that the report names, once the data are mended
        train(1, run_dir, recipe, {}, "engine.ds_config=cpu_zero2_bf16")
        assert (run_dir / "done").exists() and all(loss < 2 for loss in ranks.curve(run_dir).values())


def test_a_last_step_that_is_bad_is_saved_where_there_is_nothing_to_go_back_to(shards: Path, tmp_path: Path) -> None:
    """In fp16: its scale may be to blame for gradients that are not finite, so no sample is suspected at once."""
    recipe = ranks.recipe(tmp_path, shards, guard=GUARD, schedule={"steps": 6}, checkpoint={"every": 0})
    run_dir, bad = tmp_path / "run", {"gradients": [0], "images": {3: None, 4: None, 5: None}}
    train(1, run_dir, recipe, bad, "engine.ds_config=cpu_zero2_fp16")
    assert [len(skip["keys"]) for skip in events(run_dir, "skipped")] == [0, 16, 16, 16]
    assert events(run_dir, "rollback")[0]["why"].startswith("there is no checkpoint")
    assert ranks.meta(run_dir)["state"]["rollbacks"] == 1 and (run_dir / "done").read_text() == "6\n"


def test_a_bad_teacher_and_bad_gradients_are_skipped(shards: Path, tmp_path: Path) -> None:
    recipe = ranks.recipe(tmp_path, shards, "maskalign")
    run_dir = tmp_path / "run"
    train(2, run_dir, recipe, {"teacher": [3], "gradients": [6], "rank": 1})
    skips = events(run_dir, "skipped")
    assert [(skip["at"], skip["why"]) for skip in skips] == [
        (4, "the loss is not finite"),
        (7, "gradients are not finite"),
    ]
    assert len(skips[0]["keys"]) == 8  # of rank 1
    assert len(set(skips[1]["keys"])) == 16  # no loss shows which
    assert (run_dir / "done").exists() and ranks.meta(run_dir)["engine"]["counters"]["skipped_steps"] == 2
