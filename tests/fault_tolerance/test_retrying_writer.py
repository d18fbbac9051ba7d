"""A disk that refuses costs a warning; what belongs on it is written when it can be."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mimscale.fault_tolerance.retrying_writer import RetryingWriter
from tests.monitoring.test_run_logger import no_file_may_exceed


def test_lines_wait_and_stay_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    box, path = RetryingWriter(), tmp_path / "lines"
    with no_file_may_exceed(10):
        for word in ("first", "second", "third"):
            box.append(path, f"{word}\n")
        assert path.read_text() == "first\nseco" and "lines (File too large)" in box.flush()[0]
    box.append(tmp_path / "other", "a call for another file tries them again\n")
    assert path.read_text() == "first\nsecond\nthird\n" and box.flush() == []
    assert capsys.readouterr().err.count("waits in memory") == 1


def test_half_a_line_of_a_killed_run_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text('{"a": 1}\n{"b"')
    box = RetryingWriter()
    box.append(path, "c\n")
    box.append(path, "d\n")
    assert path.read_text() == '{"a": 1}\n{"b"\nc\nd\n'


def test_a_content_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    box, path = RetryingWriter(), tmp_path / "marker"
    box.replace(path, "old\n")
    with no_file_may_exceed(0):
        box.replace(path, "newer\n")
        box.replace(path, "newest\n")
        assert path.read_text() == "old\n" and len(box.flush(patience_s=0.1)) == 1
    assert box.flush() == [] and path.read_text() == "newest\n"
    assert [p.name for p in tmp_path.iterdir()] == ["marker"]


def test_a_folder_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    writer, start_s = RetryingWriter(), time.monotonic()
    (tmp_path / "metrics.jsonl").mkdir()
    writer.append(tmp_path / "metrics.jsonl", "line\n")
    writer.append(tmp_path / "other.jsonl", "line\n")
    (left,) = writer.flush(patience_s=600.0)
    assert "metrics.jsonl (Is a directory)" in left and time.monotonic() - start_s < 300
    assert (tmp_path / "other.jsonl").read_text() == "line\n"
