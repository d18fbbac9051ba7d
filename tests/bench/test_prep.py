"""The benchmark of data_prep prints its table."""

from __future__ import annotations

from pathlib import Path

import pytest

from mimscale.__main__ import main
from mimscale.bench.prep import measure


@pytest.mark.slow
def test_table(tmp_path: Path) -> None:
    rows = [line for line in measure(tmp_path, images=20, rounds=1).splitlines() if line.startswith("|")]
    assert len(rows) == 11 and all(row.count("|") == 6 for row in rows)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "prep", "--help"])
    assert "--images" in capsys.readouterr().out
