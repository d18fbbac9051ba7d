"""A few rows of the fault suite, so that it keeps working; `python -m tests.faults` runs all of them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep.__main__ import main as data_prep
from mimscale.checkpoint import format as checkpoint
from mimscale.data.manifest import Manifest
from mimscale.data.order import Order
from mimscale.data.synthetic import make_image_folder
from tests import ranks
from tests.checkpoint.shards import write_shard
from tests.faults import soak, trail
from tests.faults.kinds import KINDS

QUICK = ("kill_inside_a_save", "bit_flip_in_a_shard", "quota", "usr1_inside_a_save", "nan_in_many_batches")
NOTHING = trail.Samples(0, 0, 0, 0, [])
GOOD = soak.Outcome("run-001", True, True, True, NOTHING)


@pytest.mark.multi
@pytest.mark.slow
def test_some_faults(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.faults", "--quick", "--only", ",".join(QUICK)]
    done = subprocess.run(
        [*words, "--out", str(tmp_path / "table.md")], capture_output=True, text=True, env=ranks.environment()
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{len(QUICK)} faults in 2 runs, 0 with a wrong result" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    "outcome",
    [
        replace(GOOD, done=False),
        replace(GOOD, same=False),
        replace(GOOD, same_samples=False),
        replace(GOOD, failure="the run does not go on"),
        replace(GOOD, samples=replace(NOTHING, lost=1)),
        replace(GOOD, samples=replace(NOTHING, repeated=1)),
        replace(GOOD, samples=replace(NOTHING, replaced=1)),
    ],
)
def test_a_row_that_fails_is_shown(outcome: soak.Outcome) -> None:
    assert "| ok |" in soak.report([soak.Row(KINDS["kill_trainer"], GOOD)])
    row = soak.Row(KINDS["kill_trainer"], outcome)
    assert "**FAILS**" in soak.report([row]) and "kill_trainer in run-001" in soak.failures([row])


def test_a_fault_that_did_not_strike_fails() -> None:
    assert not soak.Row(KINDS["quota"], GOOD, failure="Missed: the run ended before").good
    assert not soak.Row(KINDS["nan_in_the_data"], GOOD).good  # no sample was taken away
    lost = trail.Samples(16, 0, 0, 0, [])
    assert soak.Row(KINDS["nan_in_the_data"], replace(GOOD, same=False, samples=lost)).good
    assert not soak.Row(KINDS["nan_in_the_data"], replace(GOOD, samples=replace(lost, unnamed=16))).good


def test_samples_are_counted(tmp_path: Path) -> None:
    """Position 1 is missing and no log names it, 2 comes twice, at 3 another sample stood in."""
    make_image_folder(tmp_path / "images", classes=2, per_class=4, side=16)
    assert data_prep(["folder", str(tmp_path / "images"), str(tmp_path / "shards")]) == 0
    ids = Order(Manifest.load(tmp_path / "shards"), 5, 4, 8).ids(range(6)).tolist()
    steps = [[(0, ids[0]), (2, ids[2])], [(2, ids[2]), (3, ids[4])], [(4, ids[4]), (5, ids[5])]]
    root = tmp_path / "run" / "checkpoints"
    shard = write_shard(root / ".tmp", {"fp32|w|0": torch.zeros(1)}, 0, 1)
    config = {"seed": 5, "schedule": {"global_batch": 2}, "data": {"streams": 4, "block": 8}}
    meta = {"config": config, "shapes": {"w": [1]}, "state": {"jumps": [], "trail": steps}}
    checkpoint.commit(root / ".tmp", root / "step-00000003", [shard], meta)
    found = trail.samples(tmp_path / "run", tmp_path / "shards", 3)
    assert (found.lost, found.unnamed, found.repeated, found.replaced) == (1, 1, 1, 1)


def test_the_readme_says_what_the_soak_said() -> None:
    """A line of the generated table; `python -m tests.faults --faults 200 --out tests/FAULTS.md` makes a new one."""
    page, readme = (Path(__file__).parents[2] / name for name in ("tests/FAULTS.md", "README.md"))
    said = next(line for line in page.read_text().splitlines() if " faults in " in line)
    assert said.rstrip(".") in readme.read_text()
