"""Folders as runs leave them, written by what writes them in a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from mimscale.checkpoint import run_folder
from mimscale.config.recipes import load_recipe
from mimscale.fault_tolerance.retrying_writer import RetryingWriter
from mimscale.monitoring.config import LogConfig
from mimscale.monitoring.run_logger import RunLogger
from mimscale.types import View

BEGIN = 1_790_000_000.0
HOSTILE = "</script><script>window.broken=1</script><img src=x onerror=window.broken=1>\"'&{{7*7}}"


class Folder:
    """A run of `mae_tiny` whose clock is ours. wrong_s: by how much the machine's goes wrong."""

    def __init__(self, path: Path, *overrides: str) -> None:
        self.path, self.now_s, self.wrong_s = path, BEGIN, 0.0
        self._begun_s = self.now_s
        self.config = load_recipe("mae_tiny", overrides)
        run_folder.create(path, self.config)

    def launch(self, step: int = 0, **values: Any) -> None:
        self.now_s += 100
        known = {"ranks": 2, "device": "cpu", "ds_config": "cpu_zero2_fp32", "forked_from": None, "recipe": "mae_tiny"}
        known |= {"method": "mae", "total_steps": 60, "steps_per_epoch": 12}
        line = run_folder.launch(["mimscale", "train", "mae_tiny"], step=step, **known)
        self._append("launches.jsonl", {**line, "time": self.now_s + self.wrong_s, **values})
        self._begun_s = self.now_s
        self.event("start", at=step)

    def step(self, step: int, **values: float | None) -> None:
        self.now_s += 36
        usual = {"loss": 0.3 + math.exp(-step / 40), "lr": 1e-3 * step, "images_per_s": 500.0, "data_wait": 0.02}
        self._append("metrics.jsonl", {"step": step, **usual, "loss_scale": 1.0, **values, **self._stamps()})

    def event(self, name: str, **values: Any) -> None:
        self._append("metrics.jsonl", {"event": name, **values, **self._stamps()})

    def _stamps(self) -> dict[str, float]:
        return {"time": self.now_s + self.wrong_s, "uptime_s": self.now_s - self._begun_s}

    def _append(self, name: str, values: dict[str, Any]) -> None:
        with (self.path / name).open("a") as file:
            file.write(json.dumps(values) + "\n")


def eventful(path: Path) -> Folder:
    """60 steps: a checkpoint at 20, killed at 30, started again at 20, two bad steps, a roll-back from 50 to 40."""
    run = Folder(path)
    run.launch()
    for step in range(1, 31):
        run.step(step, loss=2.0 if step > 20 else 1.0)
        if step == 20:
            run.event("saved", at=20, bytes_rank0=1)
    run.launch(step=20)
    for step in range(21, 51):
        run.step(step, loss=3.0 if step > 40 else 0.5)
        if step == 40:
            run.event("saved", at=40, bytes_rank0=1)
    run.event("skipped", at=49, why="the loss is not finite", loss=None, keys=["a"])
    run.event("skipped", at=50, why="the loss is not finite", loss=None, keys=["a"])
    run.event("rollback", at=50, to=40, jump_at=45, batches=[45, 50])
    for step in range(41, 61):
        run.step(step, loss=0.25)
    run.event("slow_rank", at=55, line="rank 1 on node7 is slow: its forward passes take 2.1 x the median")
    run.event("evals", at=60, knn=55.5, rankme=12.0, seconds=1.0)
    return run


def add_panels(run: Folder, *steps: int) -> None:
    """Drawn and written as in a run: the same two images, another reconstruction at each step."""
    logger = RunLogger(run.path, RetryingWriter(), active=True)
    logger.start(total=60, step=0, log=LogConfig(trackers=()))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for step in steps:
        features = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(step))
        mask = torch.tensor([[1.0, 0, 0, 1]] * 2)
        attention = features[..., 0]
        logger.add_panel(
            step, View(images, mask, reconstruction=images * 0.5, features=features, student_attention=attention)
        )
    logger.close()


def add_evaluation(run: Folder, protocol: str, value: float) -> None:
    """A report of `mimscale evaluate`, as far as `mimscale results` reads it."""
    report = {
        "protocol": {"name": protocol},
        "metrics": [protocol],
        "rows": [{"network": "run", "source": "x", "step": 60, "pool": "mean", protocol: value}],
        "val": {"fingerprint": "0" * 16},
    }
    (run.path / "eval").mkdir(exist_ok=True)
    (run.path / "eval" / f"{protocol}.json").write_text(json.dumps(report))
