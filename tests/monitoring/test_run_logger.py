"""What a run writes about itself."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mimscale.fault_tolerance.retrying_writer import RetryingWriter
from mimscale.monitoring.config import LogConfig
from mimscale.monitoring.metrics import StepCost, ThroughputMeter
from mimscale.monitoring.run_logger import RunLogger, shown


def test_lines_and_board(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = RunLogger(tmp_path, RetryingWriter(), active=True)
    book.start(total=4, step=0, log=LogConfig())
    book.log_event("saved", at=1)
    book.log_step(2, {"loss": 0.5, "grad_norm": math.nan})
    book.close()
    event, step = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert event["event"] == "saved" and event["at"] == 1
    assert step["step"] == 2 and step["loss"] == 0.5 and step["grad_norm"] is None
    assert 0 <= event["uptime_s"] <= step["uptime_s"] < time.monotonic() and event["time"] > 1e9
    assert "step 2/4" in capsys.readouterr().err
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [s.value for s in board.Scalars("loss")] == [0.5]


@contextmanager
def no_file_may_exceed(size: int) -> Iterator[None]:
    """A disk that refuses to take more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_delays_lines_and_loses_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = RunLogger(tmp_path, RetryingWriter(), active=True)
    with no_file_may_exceed(50_000):
        for number in range(10):
            book.log_event("long", number=number, text="x" * 9_000)
    assert (tmp_path / "metrics.jsonl").stat().st_size == 50_000
    book.log_event("short")
    book.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("number") for line in lines] == [*range(10), None]
    assert capsys.readouterr().err.count("waits in memory") == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_costs_the_board_until_the_next_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = RunLogger(tmp_path, RetryingWriter(), active=True)
    book.start(total=9000, step=0, log=LogConfig())
    with no_file_may_exceed(50_000):
        for step in range(100):
            book.log_step(step, {"x" * 100 + str(number): 0.0 for number in range(20)})
            time.sleep(0.0005)
    book.close()
    assert "left out until the next start" in capsys.readouterr().err


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = RunLogger(tmp_path, RetryingWriter(), active=False)
    book.start(total=4, step=0, log=LogConfig())
    book.log_step(1, {"loss": 1.0})
    book.print("hello")
    book.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().err == ""


def test_a_pipe_that_nobody_reads_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of `mimscale train ... 2>&1 | head`."""
    read, write = os.pipe()
    os.close(read)
    with (tmp_path / "out").open("w") as out, suppress(BrokenPipeError), os.fdopen(write, "w") as unread:
        monkeypatch.setattr("sys.stdout", out)  # where rich redirects it
        monkeypatch.setattr("sys.stderr", unread)
        book = RunLogger(tmp_path, RetryingWriter(), active=True)
        book.start(total=2, step=0, log=LogConfig(trackers=()))
        for step in (1, 2):
            book.log_step(step, {"loss": 1.0})
        book.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_phases_leave_no_gap_from_the_start_of_the_process() -> None:
    code = (
        "import time, mimscale.monitoring.metrics as metrics\n"
        "startup = metrics.StartupTimer(); startup.end('imports'); time.sleep(0.3)\n"
        "startup.end('sleep'); startup.end('imports')\n"
        "print(startup.seconds['imports'], startup.seconds['sleep'], startup.cpu_s['imports'], startup.cpu_s['sleep'])"
    )
    start_s = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    all_s = time.monotonic() - start_s
    imports_s, sleep_s, cpu_s, sleep_cpu_s = map(float, done.stdout.split())
    assert sleep_s >= 0.3 and imports_s > 0 and imports_s + sleep_s <= all_s + 0.02  # the clock's tick is 10 ms
    assert cpu_s > 0 and sleep_cpu_s < 0.3


def test_meter_averages_over_micro_steps_and_starts_anew() -> None:
    waited = [5.0]
    throughput = ThroughputMeter(torch.device("cpu"), waited_s=lambda: waited[0])
    for value in (1.0, 3.0):
        throughput.add({"loss": torch.tensor(value, dtype=torch.float16)}, images=8)
    waited[0] += 1e-9
    first = throughput.read()
    assert first["loss"] == 2.0 and first["images_per_s"] > 0 and 0 < first["data_wait"] < 1e-3
    assert first["memory_gib"] > 0
    assert not first.keys() & {"mfu", "mfu_measured", "host_share", "power_w", "memory_reserved_gib"}
    throughput.add({"loss": torch.tensor(5.0)}, images=8)
    assert throughput.read()["loss"] == 5.0


def test_utilisation_is_a_share_of_what_all_devices_can_do() -> None:
    cost = StepCost(flops=2e9, ranks=4, peak=1e12, product=5e11)
    assert cost.mfu(images_per_s=1000.0) == {"mfu": 0.5, "mfu_measured": 1.0}
    assert StepCost(flops=2e9, product=1e12).mfu(100.0) == {"mfu_measured": 0.2}
    throughput = ThroughputMeter(torch.device("cpu"), cost=cost)
    throughput.add({"loss": torch.tensor(1.0)}, images=8)
    read = throughput.read()
    assert read["mfu"] == pytest.approx(read["images_per_s"] * 2e9 / 4e12) and read["mfu_measured"] > read["mfu"]


def test_the_progress_line_shows_one_utilisation() -> None:
    known = {"loss": 1.0, "mfu": 0.5, "mfu_measured": 0.6, "grad_norm": 2.0, "power_w": 650.0}
    assert shown(known) == ["loss", "mfu", "power_w"]
    assert shown({"mfu_measured": 0.6, "images_per_s": 3.0}) == ["images_per_s", "mfu_measured"]
