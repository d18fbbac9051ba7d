"""A run of fine-tuning with a stated accuracy, so that an augmentation or a schedule that breaks silently is seen."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest

from data_prep.__main__ import main as data_prep
from mimscale.__main__ import main
from tests import ranks

pytestmark = [pytest.mark.multi, pytest.mark.slow]
RECIPE = Path(__file__).parent / "finetune_digits.yaml"
SEEDS = (0, 1, 2)
STATED, MARGIN = 88.7, 4.0
"""Percent top-1 on 500 digits, mean of the three seeds on a CPU (88.8, 90.2, 87.2), and how far it may move."""


def test_accuracy_on_digits(tmp_path: Path) -> None:
    assert data_prep(["digits", str(tmp_path / "images")]) == 0
    for part in ("train", "test"):
        assert data_prep(["folder", str(tmp_path / "images" / "digits" / part), str(tmp_path / part)]) == 0
    runs = [tmp_path / f"seed{seed}" for seed in SEEDS]
    words = [
        [str(RECIPE), f"data.shards={tmp_path / 'train'}", f"seed={seed}", "--run-dir", str(run_dir)]
        for seed, run_dir in zip(SEEDS, runs, strict=True)
    ]
    (tmp_path / "runs.json").write_text(json.dumps(words))
    ranks.run(1, "tests.training.several", tmp_path / "runs.json")
    out = tmp_path / "top1.json"
    command = [*map(str, runs), "--val", str(tmp_path / "test"), "--workers", "0", "--device", "cpu", "--out", str(out)]
    assert main(["evaluate", "top1", *command]) == 0
    found = [row["top1"] for row in json.loads(out.read_text())["rows"]]
    assert len(found) == len(SEEDS) and mean(found) == pytest.approx(STATED, abs=MARGIN), found
    assert min(found) > STATED - 2 * MARGIN
