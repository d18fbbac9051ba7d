"""Signals and stop files raise a flag; the requeue marker is whole or absent."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mimscale.fault_tolerance.preemption import SIGNALS, Preemption, ignore_signals, leave_requeue_marker
from mimscale.fault_tolerance.retrying_writer import RetryingWriter


@pytest.fixture(autouse=True)
def restore_handlers() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_raises_the_flag(number: signal.Signals) -> None:
    preemption = Preemption([])
    assert not preemption.raised()
    os.kill(os.getpid(), number)
    assert preemption.raised() and preemption.reason == number.name


def test_stop_file(tmp_path: Path) -> None:
    preemption = Preemption([tmp_path / "a", tmp_path / "b"], poll_s=0.0)
    assert not preemption.raised()
    (tmp_path / "b").touch()
    assert preemption.raised() and str(preemption.reason).endswith("b")


def test_signals_are_ignored_at_the_end() -> None:
    Preemption([])
    ignore_signals()
    for number in SIGNALS:
        os.kill(os.getpid(), number)  # would end this process if it were not ignored


def test_requeue_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIMSCALE_REQUEUE_FILE", raising=False)
    leave_requeue_marker(RetryingWriter(), 3)
    monkeypatch.setenv("MIMSCALE_REQUEUE_FILE", str(tmp_path / "again"))
    leave_requeue_marker(RetryingWriter(), 41)
    assert [p.name for p in tmp_path.iterdir()] == ["again"]
    assert (tmp_path / "again").read_text() == "41 asked\n"
