"""Signals and stop files raise a flag; the requeue marker is whole or absent."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mimscale.fault_tolerance.preemption import HANDLED, SIGNALS, Preemption, ignore_signals, leave_requeue_marker
from mimscale.fault_tolerance.retrying_writer import RetryingWriter


@pytest.fixture(autouse=True)
def restore_handlers() -> Iterator[None]:
    before = [signal.getsignal(number) for number in HANDLED]
    yield
    for number, handler in zip(HANDLED, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_raises_the_flag(number: signal.Signals) -> None:
    preemption = Preemption([])
    assert not preemption.raised()
    os.kill(os.getpid(), number)
    assert preemption.raised() and preemption.reason == number.name


def test_a_worker_that_was_just_forked_prints_no_traceback_of_ctrl_c() -> None:
    """Until it ignores the signal itself, it has the trainer's handler."""
    preemption = Preemption([])
    worker = os.fork()
    if worker == 0:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(0 if preemption.reason is None else 1)
        except BaseException:
            os._exit(2)
    assert os.waitpid(worker, 0)[1] == 0
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


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
