"""Panels are drawn in a thread that the loop never waits for."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mimscale.fault_tolerance.retrying_writer import RetryingWriter
from mimscale.monitoring import panel_writer
from mimscale.monitoring.config import LogConfig
from mimscale.monitoring.run_logger import RunLogger
from mimscale.types import View


def view() -> View:
    return View(torch.rand(2, 3, 16, 16), mask=torch.tensor([[1.0, 0, 0, 1]] * 2), features=torch.rand(2, 4, 5))


def open_logger(folder: Path) -> RunLogger:
    book = RunLogger(folder, RetryingWriter(), active=True)
    book.start(total=10, step=0, log=LogConfig())
    return book


def panels(folder: Path) -> list[int]:
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    return [image.step for image in board.Images("view")] if "view" in board.Tags()["images"] else []


def test_close_finishes_what_waits(tmp_path: Path) -> None:
    logger = open_logger(tmp_path)
    logger.add_panel(3, view())
    logger.close()
    assert panels(tmp_path) == [3]


def test_a_slow_panel_costs_panels_and_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go, draw = threading.Event(), threading.Event(), panel_writer.tiles

    def slow(view: View) -> dict[str, torch.Tensor]:
        begun.set()
        assert go.wait(60)
        return draw(view)

    monkeypatch.setattr(panel_writer, "tiles", slow)
    logger = open_logger(tmp_path)
    logger.add_panel(1, view())
    assert begun.wait(60)
    for step in range(2, panel_writer.WAITING + 4):  # the last two are dropped, and the next line is reached at once
        logger.add_panel(step, view())
    go.set()
    logger.close()
    assert panels(tmp_path) == list(range(1, panel_writer.WAITING + 2))


def test_a_panel_that_fails_is_an_event_and_the_next_one_is_drawn(tmp_path: Path) -> None:
    logger = open_logger(tmp_path)
    logger.add_panel(1, View(torch.rand(2, 3, 16, 16), mask=torch.ones(2, 5)))  # five patches are no square
    while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text():
        time.sleep(0.01)
    logger.add_panel(2, view())
    logger.close()
    (event,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert event["event"] == "panel_failed" and event["at"] == 1
    assert panels(tmp_path) == [2]
