"""DeepSpeed as a library."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import ranks


@pytest.mark.multi
@pytest.mark.slow
def test_a_run_logs_no_warning_of_a_library(shards: Path, tmp_path: Path) -> None:
    """ZeRO-3 calls every collective that torch has deprecated."""
    words: list[str | Path] = [ranks.recipe(tmp_path, shards), "schedule.steps=6", "engine.ds_config=cpu_zero3_fp32"]
    done = ranks.run(2, "mimscale", "train", *words, "--run-dir", tmp_path / "run")
    assert "done:" in done.stdout + done.stderr
    assert "Warning" not in done.stdout + done.stderr
