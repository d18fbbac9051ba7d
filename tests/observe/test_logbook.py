"""What a run writes about itself."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mimscale.observe.logbook import Logbook
from mimscale.observe.meter import Meter


def test_lines_and_board(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = Logbook(tmp_path, active=True, tensorboard=True, total=4, step=0)
    book.event("saved", at=1)
    book.step(2, {"loss": 0.5, "grad_norm": math.nan})
    book.close()
    event, step = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert event["event"] == "saved" and event["at"] == 1
    assert step["step"] == 2 and step["loss"] == 0.5 and step["grad_norm"] is None
    assert "step 2/4" in capsys.readouterr().err
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [s.value for s in board.Scalars("loss")] == [0.5]


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = Logbook(tmp_path, active=False, tensorboard=True, total=4, step=0)
    book.step(1, {"loss": 1.0})
    book.say("hello")
    book.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().err == ""


def test_meter_averages_over_micro_steps_and_starts_anew() -> None:
    meter = Meter(torch.device("cpu"))
    for value in (1.0, 3.0):
        meter.add({"loss": torch.tensor(value, dtype=torch.float16)}, images=8)
    with meter.waiting():
        pass
    first = meter.read()
    assert first["loss"] == 2.0 and first["images_per_s"] > 0 and 0 <= first["data_wait"] < 1
    assert first["memory_gib"] > 0
    meter.add({"loss": torch.tensor(5.0)}, images=8)
    assert meter.read()["loss"] == 5.0
