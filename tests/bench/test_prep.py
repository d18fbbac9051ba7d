"""The benchmark of data_prep prints its table."""

from __future__ import annotations

from pathlib import Path

import pytest

from mimscale.__main__ import main
from mimscale.bench.prep import measure


@pytest.mark.slow
def test_table(tmp_path: Path) -> None:
    (heads, rows), size = measure(tmp_path, images=20, rounds=1)
    assert len(heads) == 5 and len(rows) == 9 and all(len(row) == 5 for row in rows) and size.startswith("20 JPEGs")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "prep", "--help"])
    assert "--images" in capsys.readouterr().out
