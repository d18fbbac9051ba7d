"""A few rows of the fault suite, so that it keeps working; `python -m tests.faults` runs all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import ranks

QUICK = ("kill_inside_a_save", "bit_flip_in_a_shard", "quota", "usr1_inside_a_save", "nan_in_many_batches")


@pytest.mark.multi
@pytest.mark.slow
def test_some_faults(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "tests.faults",
        "--quick",
        "--only",
        ",".join(QUICK),
        "--out",
        str(tmp_path / "table.md"),
    ]
    done = subprocess.run(words, capture_output=True, text=True, env=ranks.environment())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{len(QUICK)} faults in 2 runs, 0 of them" in (tmp_path / "table.md").read_text()
