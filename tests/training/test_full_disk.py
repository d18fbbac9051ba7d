"""A disk that refuses under the whole run folder, in the real trainer: it costs a save and warnings, never the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests import ranks
from tests.training.test_guard import GUARD, events, train

pytestmark = [pytest.mark.multi, pytest.mark.slow]
NOW = "checkpoint.patience_s=0"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("full")
    return ranks.recipe(folder, shards, guard=GUARD, schedule={"steps": 16}, data={"workers": 0})


@pytest.fixture(scope="module")
def at_step_4(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    folder = tmp_path_factory.mktemp("begun")
    ranks.train(1, recipe, folder / "whole")
    ranks.cut_back(folder / "whole", folder / "run", 4)
    (folder / "run" / "metrics.jsonl").unlink()
    return folder / "run"


def test_what_could_not_be_written_is_written_when_there_is_room(recipe: Path, at_step_4: Path, tmp_path: Path) -> None:
    """No room from batch 6 to 14: a save, a roll-back with its list, and the log lines fall into that time."""
    run_dir = Path(shutil.copytree(at_step_4, tmp_path / "run"))
    text = train(1, run_dir, recipe, {"images": {10: None, 11: None, 12: None}, "full": [6, 14]}, NOW)
    assert "metrics.jsonl: File too large; what belongs there waits in memory" in text
    (back,) = events(run_dir, "rollback")
    assert (back["at"], back["to"]) == (13, 4)
    assert events(run_dir, "save_failed")[0]["at"] == 8
    (start,) = events(run_dir, "first_step")
    assert {"imports", "engine", "manifest", "verify", "load", "workers", "first_step"} <= start["seconds"].keys()
    left_out = [json.loads(line)["batch"] for line in (run_dir / "left_out.jsonl").read_text().splitlines()]
    assert left_out == list(range(*back["batches"]))
    assert sorted(ranks.curve(run_dir)) == list(range(5, 17)) and (run_dir / "done").exists()


def test_the_last_word_says_what_is_missing(recipe: Path, at_step_4: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(at_step_4, tmp_path / "run"))
    text = train(1, run_dir, recipe, {"full": [5, None]}, NOW, code=4)
    assert "the last checkpoint could not be written; 4 is the newest" in text.splitlines()[-1]
    assert f"could not be written: {run_dir}/metrics.jsonl (File too large)" in text
    assert not (run_dir / "done").exists()

    for name in ("launches.jsonl", "left_out.jsonl"):
        (run_dir / name).unlink(missing_ok=True)
        (run_dir / name).mkdir()
    text = train(2, run_dir, recipe, {"images": {5: None}}, NOW, "guard.skips=1")
    assert (run_dir / "done").exists() and len(events(run_dir, "rollback")) == 1
    assert all(f"{run_dir}/{name} (Is a directory)" in text for name in ("launches.jsonl", "left_out.jsonl"))


def test_a_slow_last_save_is_no_hang(shards: Path, tmp_path: Path) -> None:
    """One rank's disk takes three times as long as a hang may; the other has nothing to do but to wait for it."""
    recipe, run_dir = ranks.recipe(tmp_path, shards, schedule={"steps": 3}, checkpoint={"every": 0}), tmp_path / "run"
    train(2, run_dir, recipe, {"slow_save_s": 12, "rank": 1}, "watchdog.stall_s=4")
    assert (run_dir / "done").exists() and not (run_dir / "hang").exists()
