"""Three epochs with real processes, stopped at a random step and resumed on other numbers of ranks: equal samples."""

from __future__ import annotations

import hashlib
import multiprocessing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimscale.data.config import DataConfig
from mimscale.data.loader import TrainLoader
from mimscale.data.manifest import Manifest
from mimscale.types import Needs

GLOBAL, STEPS = 8, 30  # of 80 samples: three epochs
STOP = int(np.random.default_rng().integers(1, STEPS))  # a resume must work from any step


def _rank(shards: Path, rank: int, world: int, start: int, stop: int, results: Any) -> None:
    data = DataConfig(shards=str(shards), image_size=16, workers=1, streams=4, block=8)
    sizes = {"global_batch": GLOBAL, "micro_batch": GLOBAL // world, "rank": rank, "world": world, "start_step": start}
    loader = TrainLoader(Manifest.load(shards), data, Needs(), seed=2, **sizes)  # type: ignore[arg-type]
    for batch in islice(loader, stop - start):
        pixels = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch.images]
        results.put(list(zip(batch.positions.tolist(), batch.ids.tolist(), pixels, strict=True)))
    loader.close()
    results.put(None)


def sequence(shards: Path, world: int, start: int, stop: int) -> list[tuple[int, int, str]]:
    """(position, sample id, sha256 of its pixels) in the global order."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(shards, r, world, start, stop, results)) for r in range(world)]
    for process in ranks:
        process.start()
    found = list[tuple[int, int, str]]()
    running = world
    while running:
        part = results.get(timeout=120)
        running -= part is None
        found += part or []
    for process in ranks:
        process.join()
    return sorted(found)


@pytest.mark.multi
def test_three_epochs_on_any_number_of_ranks(shards: Path) -> None:
    expected = sequence(shards, 2, 0, STEPS)
    assert [position for position, _, _ in expected] == list(range(STEPS * GLOBAL))
    for epoch in range(3):
        assert sorted(sample for _, sample, _ in expected[epoch * 80 : (epoch + 1) * 80]) == list(range(80))
    before = sequence(shards, 2, 0, STOP)
    for world in (1, 2, 4):
        assert before + sequence(shards, world, STOP, STEPS) == expected, f"stopped at step {STOP}, resumed on {world}"
