"""Benchmarks are found by the name of their file."""

from __future__ import annotations

import pytest

from mimscale import bench
from mimscale.__main__ import main
from mimscale.bench import _report


def test_the_verb_lists_every_bench(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in bench.names()) and "_report" not in shown


def test_tables_are_markdown_with_their_origin() -> None:
    assert _report.table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
    assert "commit " in _report.origin() and "cores" in _report.origin()
