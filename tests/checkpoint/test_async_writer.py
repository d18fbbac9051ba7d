"""Saving in the background: what is on disk is whole, the training never waits for a disk, and failures cost no run."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mimscale.checkpoint import format as checkpoint
from mimscale.checkpoint.async_writer import AsyncCheckpointWriter
from mimscale.checkpoint.config import CheckpointConfig
from mimscale.checkpoint.host_buffer import HostBuffer
from mimscale.distributed.coordination import Coordinator
from mimscale.errors import Stopped

LIKE = {"fp32|w|0": torch.zeros(300_000), "exp_avg|w|0": torch.zeros(300_000), "weight|ids|7": torch.zeros(5).byte()}


def values(number: float) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, number) for name, tensor in LIKE.items()}


def meta(step: int) -> dict[str, Any]:
    return {"step": step, "shapes": {"w": [300_000], "ids": [12]}}


class Run:
    """A saver of one rank, and what it told."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.root, self.taken_over = folder / "checkpoints", False
        options = CheckpointConfig(patience_s=0.0).model_copy(update=config)
        self.saver = AsyncCheckpointWriter(self.root, Coordinator(), options, LIKE, self._unchanged, self._note)

    def _unchanged(self) -> None:
        if self.taken_over:
            raise Stopped("taken over")

    def _note(self, name: str, **values: Any) -> None:
        self.events.append((name, values))

    def save(self, step: int) -> None:
        self.saver.save(step, values(step), meta(step))

    def step(self) -> None:
        """What the loop does at each step."""
        self.saver.poll()

    def saved(self) -> list[int]:
        return [checkpoint.step_of(path) for path in checkpoint.complete(self.root)]


@pytest.fixture
def small_files() -> Iterator[None]:
    """A quota: files end at 1 MB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_is_whole_and_carries_the_values_of_its_moment(tmp_path: Path) -> None:
    run, live = Run(tmp_path), values(3)
    run.saver.save(3, live, meta(3))
    for tensor in live.values():
        tensor.fill_(99)  # the next step, while the thread writes
    while not run.events:
        run.step()
    (path,) = checkpoint.complete(run.root)
    reader = checkpoint.CheckpointReader(path)
    reader.verify()
    assert torch.equal(reader.full("exp_avg", "w"), torch.full((300_000,), 3.0))
    part = torch.zeros(2, dtype=torch.uint8)
    reader.into("weight", "ids", 9, part)
    assert part.tolist() == [3, 3] and reader.meta["step"] == 3
    assert run.events[0][0] == "saved" and run.events[0][1]["at"] == 3
    assert not list(run.root.glob(".tmp*")) and "save" not in [thread.name for thread in threading.enumerate()]


def test_the_training_does_not_wait_for_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one save is under way the next is skipped, with a note; the one under way ends whole."""
    go, write = threading.Event(), HostBuffer.write
    monkeypatch.setattr(HostBuffer, "write", lambda self, path: go.wait() and write(self, path))
    run = Run(tmp_path, wait_s=0.01)
    run.save(1)
    run.step()
    run.save(2)
    assert run.events == [("save_skipped", {"at": 2, "busy_with": 1})] and run.saved() == []
    go.set()
    assert run.saver.wait_for_writes() and run.saved() == [1]
    run.save(3)
    assert run.saver.wait_for_writes() and run.saved() == [1, 3]


def test_a_slow_save_is_known_to_be_alive_and_a_hung_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the last save goes on, the watchdog is told so, as long as bytes are written."""
    moves, go = threading.Event(), threading.Event()

    def write(self: HostBuffer, path: Path) -> tuple[int, str]:
        while not go.wait(0.005):
            self.written += moves.is_set()
        path.touch()
        return 0, "00" * 32

    monkeypatch.setattr(HostBuffer, "write", write)
    told: list[float] = []
    saver = AsyncCheckpointWriter(
        tmp_path, Coordinator(), CheckpointConfig(), LIKE, alive=lambda: told.append(time.monotonic())
    )
    saver.save(1, values(1), meta(1))
    assert saver.wait_for_writes(0.5) is None and len(told) == 1
    moves.set()
    assert saver.wait_for_writes(1.0) is None and len(told) > 3
    go.set()
    assert saver.wait_for_writes()


def test_checkpoints_beyond_the_one_that_is_saved_are_of_a_way_that_was_left(tmp_path: Path) -> None:
    """A roll-back removes them; where the disk refused that, they must not outlive the new ones."""
    run = Run(tmp_path, keep=3)
    for step in (4, 8, 9, 5):
        run.save(step)
        assert run.saver.wait_for_writes()
    assert run.saved() == [4, 5]


def test_a_full_disk_costs_one_save_and_nothing_else(
    tmp_path: Path, small_files: None, capfd: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    run = Run(tmp_path, keep=1)
    run.save(1)
    assert run.saver.wait_for_writes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run.save(2)
    assert not run.saver.wait_for_writes() and run.saved() == [1]
    assert run.events[-1][0] == "save_failed" and "File too large" in run.events[-1][1]["why"]
    assert "given up" in capfd.readouterr().err and not list(run.root.glob(".tmp*"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    run.save(3)
    assert run.saver.wait_for_writes() and run.saved() == [3]


def test_a_disk_that_recovers_in_time_loses_nothing(tmp_path: Path, small_files: None) -> None:
    run = Run(tmp_path, patience_s=60.0)
    run.save(1)
    time.sleep(0.2)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert run.saver.wait_for_writes() and run.saved() == [1]


def test_no_folder_can_be_made(tmp_path: Path) -> None:
    """As on a read-only mount: a file stands where the folder should be."""
    run = Run(tmp_path)
    run.root.write_text("")
    run.save(1)
    assert not run.saver.wait_for_writes()
    run.root.unlink()
    run.save(2)
    assert run.saver.wait_for_writes() and run.saved() == [2]


def test_an_older_generation_neither_commits_nor_prunes(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=1)
    run.save(1)
    assert run.saver.wait_for_writes()
    run.taken_over = True
    run.save(2)
    assert not run.saver.wait_for_writes() and run.saved() == [1]
    assert "taken over" in run.events[-1][1]["why"]


def test_the_file_is_written_from_the_buffer_alone(tmp_path: Path) -> None:
    """Every dtype at its place, in a file that the official library reads."""
    from safetensors.torch import load_file

    kinds = (torch.uint8, torch.float32, torch.int64, torch.bfloat16, torch.bool, torch.float16)
    tensors = {f"a|{i}|0": (torch.arange(i + 3) % 2).to(dtype) for i, dtype in enumerate(kinds)}
    copy = HostBuffer(tensors).fill(tensors)
    size, _ = copy.write(tmp_path / "file")
    loaded = load_file(tmp_path / "file")
    assert size == os.path.getsize(tmp_path / "file")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match="other tensors"):
        copy.fill({"b|0|0": torch.zeros(1)})
