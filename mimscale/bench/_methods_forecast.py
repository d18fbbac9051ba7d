"""What a benchmark of methods will take, from step times measured here."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mimscale.bench._methods_rows import IMAGE, ROWS, Preset, finetuning, pretraining
from mimscale.config.recipes import load_recipe
from mimscale.config.run import RunConfig, method_class
from mimscale.data.loader import eval_batches
from mimscale.data.manifest import Manifest
from mimscale.teachers.ensemble import TeacherEnsemble, build_skeletons, describe
from mimscale.types import Batch

WARM_UP, STEPS = 1, 2
START_S = 3.0  # start, building and closing of the runs of one cell
PROBES_S = 13.0  # of the fits of probes, 8 of them the attentive one
READ_BATCHES = 4


def forecast(out: Path, preset: Preset, cells: Sequence[tuple[str, int]], jobs: int) -> tuple[list[list[str]], float]:
    """(rows of the table, seconds of all cells). On a CPU it counts the CPU time of one thread, so that other
    programs do not lengthen it.
    """
    torch.set_num_threads(1)
    data = str(out / "data" / "train")
    clock = time.process_time if preset.device == "cpu" else time.perf_counter
    read_s = _read_seconds(out / "data" / "train", clock)
    images = preset.images + preset.test
    tune = {}
    lines, total = [], 0.0
    for name, count in Counter(row for row, _ in cells).items():
        row = ROWS[name]
        step_s = seconds = 0.0
        if row.kind in ("pretrained", "random", "supervised"):
            if row.encoder not in tune:
                words = finetuning(row, preset, data, 0, None, preset.finetune_steps)
                tune[row.encoder] = _step_seconds(load_recipe("mae_tiny", words), preset, clock) + read_s * preset.batch
            seconds += tune[row.encoder] * preset.finetune_steps
        if row.kind == "pretrained":
            config = load_recipe(row.recipe, pretraining(row, name, preset, data, 0))
            step_s = _step_seconds(config, preset, clock) + read_s * preset.batch
        elif row.kind == "supervised":
            step_s = tune[row.encoder]
        seconds += step_s * preset.steps + images * (2 * read_s) + START_S + PROBES_S
        if row.kind in ("pretrained", "random", "supervised"):
            seconds += images * tune[row.encoder] / preset.batch / 2  # features: a forward pass
        lines.append([name, str(count), f"{1000 * step_s:.0f}" if step_s else "", f"{seconds:.0f}"])
        total += count * seconds
    at_once = min(jobs, os.cpu_count() or 1) if preset.device == "cpu" else jobs  # more do not make cores faster
    return lines, total / at_once


def _read_seconds(shards: Path, clock: Callable[[], float]) -> float:
    """Of one image."""
    start, read = clock(), 0
    for batch in eval_batches(Manifest.load(shards), IMAGE, batch=50, workers=0, crop_pct=1.0, rank=0, world=1):
        read += len(batch.images)
        if read >= 50 * READ_BATCHES:
            break
    return (clock() - start) / max(1, read)


def _step_seconds(config: RunConfig, preset: Preset, clock: Callable[[], float]) -> float:
    """Of one optimiser step on random images, teachers included, without reading."""
    device = torch.device(preset.device)
    skeletons = build_skeletons(config.teachers, IMAGE)
    infos = describe(skeletons)
    with torch.random.fork_rng(devices=[]):
        method: Any = method_class(config.method.name)(config, infos).to(device)
    random = {n: t.model_copy(update={"random": True, "weights": None}) for n, t in config.teachers.items()}
    ensemble = TeacherEnsemble(random, skeletons, method.needs.teachers, IMAGE, device)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-4)
    batch = _batch(method, preset.batch).to(device)

    def step() -> None:
        method(batch, ensemble(batch.images))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(WARM_UP):
        step()
    start = clock()
    for _ in range(STEPS):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) / STEPS


def _batch(method: Any, count: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    noise = {
        purpose: torch.rand(count, *wanted.shape, generator=generator) + 1e-3
        for purpose, wanted in method.needs.noise.items()
    }
    ids = torch.arange(count)
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(count, 4)
    images = torch.randn(count, 3, IMAGE, IMAGE, generator=generator)
    return Batch(images, ids, ids, noise, boxes, torch.zeros(count, dtype=torch.bool), labels=ids % 10)
