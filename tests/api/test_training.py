"""`mimscale.train`: several runs in one process, each as `mimscale train` would train it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mimscale.checkpoint import format as checkpoint
from tests import ranks

Found = dict[str, dict[str, Any]]


def trained(count: int, folder: Path, shards: Path) -> list[Found]:
    """What each rank found. The run in `damaged` cannot be continued: its only checkpoint is cut short."""
    ranks.recipe(folder, shards, schedule={"steps": 6, "warmup_epochs": 0.2}, checkpoint={"every": 0})
    ranks.train(1, folder / "recipe.yaml", folder / "damaged")
    (folder / "damaged" / "done").unlink()
    newest = checkpoint.newest(folder / "damaged")
    assert newest is not None
    for path in newest.glob("shard-*"):
        path.write_bytes(path.read_bytes()[:-100])
    ranks.run(count, "tests.api.trains", folder, shards)
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(count)]


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_runs_one_after_the_other_in_one_process(count: int, tmp_path: Path, shards: Path) -> None:
    everyone = trained(count, tmp_path, shards)
    for found in everyone:
        first = found["first"]
        assert (first["step"], first["finished"], first["run_dir"]) == (6, True, str(tmp_path / "a"))
        assert first["metrics"]["loss"] == ranks.curve(tmp_path / "a")[6] and "step" not in first["metrics"]
        assert found["again"] == first  # it is finished, so nothing is done
        assert found["refused"]["error"] == found["damaged"]["error"] == "UserError"
        assert "schedule.steps: 6 -> 4" in found["refused"]["text"]
        assert "every checkpoint in" in found["damaged"]["text"]
        assert found["zero3"]["step"] == 6 and found["zero3"]["metrics"]["loss"] != first["metrics"]["loss"]
        assert (found["fork"]["step"], found["fork"]["run_dir"]) == (4, str(tmp_path / "forked"))
        assert "override student: a object has no place in a recipe" in found["value"]["text"]
        assert "did you mean 'steps'?" in found["key"]["text"]
        assert "must be called from the main thread" in found["thread"]["text"]
        for one in found.values():
            assert one["threads"] == [] and one["default_signals"] and one["gc"], one
    launch = json.loads((tmp_path / "a" / "launches.jsonl").read_text())
    assert launch["command"][0] == "mimscale.train" and launch["ranks"] == count
    assert not (tmp_path / "damaged" / "lock").read_bytes()  # free for who comes next

    ranks.train(count, tmp_path / "recipe.yaml", tmp_path / "plain", "optim.betas=[0.9,0.99]")
    assert ranks.identical(tmp_path / "a", tmp_path / "plain")
