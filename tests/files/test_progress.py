"""Progress on a terminal, which is a real pseudo-terminal here, and in a log; colours; nothing of it on stdout."""

from __future__ import annotations

import os
import pty
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.__main__ import main as data_prep
from mimscale.__main__ import main
from mimscale.data.synthetic import make_image_folder
from mimscale.files import progress
from mimscale.files.console import plain_console

COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-7]|38|4[0-7]|9[0-7])[0-9;]*m")


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], str]:
    """What `work` writes to stderr where that is a terminal."""

    def seen(work: Callable[[], object]) -> str:
        ours, theirs = pty.openpty()
        monkeypatch.setenv("TERM", "xterm-256color")
        with os.fdopen(theirs, "w") as terminal:
            monkeypatch.setattr(sys, "stderr", terminal)
            work()
            terminal.flush()
            os.set_blocking(ours, False)
            text = b""
            while True:
                try:
                    text += os.read(ours, 1 << 16)
                except BlockingIOError:
                    break
        os.close(ours)
        return text.decode()

    return seen


def some_work() -> None:
    with progress.progress("counting", 4, "things") as advance:
        for _ in range(4):
            advance(1)


def test_a_bar_on_a_terminal(
    on_terminal: Callable[[Callable[[], object]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = on_terminal(some_work)
    assert "counting" in text and "4/4" in text and "things/s" in text and COLOUR.search(text)


def test_no_color(on_terminal: Callable[[Callable[[], object]], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = on_terminal(some_work)
    assert "4/4" in text and not COLOUR.search(text)


def test_stdout_is_not_taken_by_a_bar(
    on_terminal: Callable[[Callable[[], object]], str], capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        with progress.working("waiting"):
            print("a result")
        list(progress.tracked([1], 1, "one", "items"))

    text = on_terminal(work)
    assert "a result" not in text and "waiting" in text and "one" in text
    assert capsys.readouterr().out == "a result\n"


def test_lines_in_a_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    some_work()
    assert capsys.readouterr().err == ""  # nothing for what is short
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.0)
    some_work()
    out, err = capsys.readouterr()
    assert re.search(r"^counting: 2 of 4 things, [\d.e+,]+ things/s, 0 s left$", err, re.MULTILINE)
    assert "\x1b" not in err
    with progress.progress("counting", 0, "things") as advance:
        advance(1000)
    assert capsys.readouterr().err.startswith("counting: 1,000 things, ") and not out
    with progress.working("waiting"):
        while not capsys.readouterr().err.startswith("waiting: 0 s so far\n"):
            time.sleep(0.01)


def test_the_thread_ends_where_the_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    before = threading.active_count()
    with pytest.raises(ValueError, match="broken"), progress.working("waiting"):
        assert threading.active_count() == before + 1
        raise ValueError("broken")
    assert threading.active_count() == before


@pytest.mark.parametrize("verb", ["folder", "table", "index", "verify", "synthetic"])
def test_data_prep_says_how_far_it_is(
    verb: str, tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.0)
    images = make_image_folder(tmp_path / "images", classes=2, per_class=3, side=32)
    (tmp_path / "list.txt").write_text("\n".join(f"{path}" for path in sorted(images.rglob("*.jpg"))))
    words, said = {
        "folder": ([str(images), str(tmp_path / "out")], "listing: 3 files"),
        "table": ([str(tmp_path / "list.txt"), str(tmp_path / "out")], "listing: 3 rows"),
        "index": ([str(shards), "--to", str(tmp_path / "out")], "indexing: 2 of 5 shards"),
        "verify": ([str(shards)], "verifying: 32 of 80 images"),
        "synthetic": ([str(tmp_path / "out"), "--classes", "2", "--per-class", "2"], "writing: 2 of 4 images"),
    }[verb]
    assert data_prep([verb, *words]) == 0
    assert said in capsys.readouterr().err


def test_a_table_without_a_terminal_has_no_colour(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "mae_tiny"]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert plain_console(stderr=True).is_terminal is False
