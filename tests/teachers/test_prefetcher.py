"""The teachers one micro-batch ahead: the same batches and targets in the same order, prepared when they are used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from mimscale.config.recipes import load_recipe
from mimscale.data.device_prefetch import DevicePrefetcher
from mimscale.errors import UserError
from mimscale.teachers.ensemble import TeacherEnsemble
from mimscale.teachers.prefetcher import TeacherPrefetcher
from mimscale.types import Batch, Targets
from tests.teachers import tiny

DINO = "vit_base_patch16_224.dino"


def raw(number: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    return Batch(
        images=torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=generator),
        ids=torch.tensor([number, number]),
        positions=torch.arange(2),
        noise={"mask": torch.rand(2, 4, generator=generator)},
        boxes=torch.zeros(2, 4),
        flips=torch.zeros(2, dtype=torch.bool),
    )


def iterate(
    batches: Iterator[Batch], ensemble: TeacherEnsemble, **how: Any
) -> Iterator[tuple[Batch, dict[str, Targets]]]:
    prefetcher = TeacherPrefetcher(ensemble, tiny.CPU, DevicePrefetcher(batches, tiny.CPU), **how)
    while True:
        try:
            raw = prefetcher.next_batch()
        except StopIteration:
            return
        batch, targets = prefetcher.targets()
        assert torch.equal(raw.ids, batch.ids)
        yield batch, targets


@pytest.mark.parametrize("count", [0, 1, 4])
def test_same_batches_and_targets_ahead_and_in_order(count: int) -> None:
    ensemble = tiny.ensemble(tiny.timm_config(DINO, None, random=True), 32)
    plain, early = (list(iterate(map(raw, range(count)), ensemble, ahead=ahead)) for ahead in (False, True))
    assert len(plain) == len(early) == count
    for number, ((batch, targets), (other, same)) in enumerate(zip(plain, early, strict=True)):
        assert batch.ids[0] == other.ids[0] == number
        assert torch.equal(batch.images, raw(number).normalised().images) and torch.equal(batch.images, other.images)
        assert torch.equal(batch.noise["mask"], other.noise["mask"])
        assert torch.equal(targets["t"].levels[2], same["t"].levels[2])
        assert torch.equal(targets["t"].levels[2], ensemble(batch.images)["t"].levels[2])


@pytest.mark.parametrize("ahead", [False, True])
def test_a_batch_is_prepared_when_it_is_used(ahead: bool) -> None:
    """What a method learned in step i must reach the batch of step i + 1, also if its teachers ran before."""
    fetched: list[int] = []
    learned = 0.0

    def source() -> Iterator[Batch]:
        for number in range(3):
            fetched.append(number)
            yield raw(number)

    def prepare(batch: Batch) -> Batch:
        return replace(batch, noise={"mask": torch.full((2, 4), learned)})

    ensemble = tiny.ensemble(tiny.timm_config(DINO, None, random=True), 32)
    for number, (batch, _) in enumerate(iterate(source(), ensemble, ahead=ahead, prepare=prepare)):
        assert float(batch.noise["mask"].mean()) == learned == float(number)
        assert torch.equal(batch.images, raw(number).normalised().images)
        assert fetched == [0, 1, 2][: number + (2 if ahead else 1)]
        learned += 1


def test_ahead_and_split_teachers_do_not_go_together() -> None:
    shared = ["teachers.clip.shard=true", "data.shards=none"]
    assert load_recipe("maskalign_vit_b16", shared).teachers["clip"].shard
    with pytest.raises(UserError, match="engine.teachers_ahead = true with teachers.clip.shard = true"):
        load_recipe("maskalign_vit_b16", [*shared, "engine.teachers_ahead=true"])
