"""The teachers one micro-batch ahead: the same batches and targets in the same order, prepared when they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from mimscale.config import load
from mimscale.contracts import Batch
from mimscale.errors import UserError
from mimscale.teachers.ahead import Lessons
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


@pytest.mark.parametrize("count", [0, 1, 4])
def test_same_lessons_ahead_and_in_order(count: int) -> None:
    bank = tiny.bank(tiny.timm_config(DINO, None, random=True), 32)
    plain, early = (list(Lessons(map(raw, range(count)), bank, tiny.CPU, ahead=ahead)) for ahead in (False, True))
    assert len(plain) == len(early) == count
    for number, ((batch, targets), (other, same)) in enumerate(zip(plain, early, strict=True)):
        assert batch.ids[0] == other.ids[0] == number
        assert torch.equal(batch.images, raw(number).normalised().images) and torch.equal(batch.images, other.images)
        assert torch.equal(batch.noise["mask"], other.noise["mask"])
        assert torch.equal(targets["t"].levels[2], same["t"].levels[2])
        assert torch.equal(targets["t"].levels[2], bank(batch.images)["t"].levels[2])


@pytest.mark.parametrize("ahead", [False, True])
def test_a_batch_is_prepared_when_it_is_used_and_waiting_is_around_the_loader(ahead: bool) -> None:
    """What a method learned in step i must reach the batch of step i + 1, also if its teachers ran before."""
    events: list[str] = []
    learned = 0.0

    def source() -> Iterator[Batch]:
        for number in range(3):
            events.append(f"fetch {number}")
            yield raw(number)

    def prepare(batch: Batch) -> Batch:
        return replace(batch, noise={"mask": torch.full((2, 4), learned)})

    @contextmanager
    def waiting() -> Iterator[None]:
        events.append("wait")
        yield
        events.append("go")

    bank = tiny.bank(tiny.timm_config(DINO, None, random=True), 32)
    lessons = Lessons(source(), bank, tiny.CPU, ahead=ahead, prepare=prepare, waiting=waiting)
    for number, (batch, _) in enumerate(lessons):
        assert batch.ids[0] == number and batch.images.dtype == torch.float32
        assert float(batch.noise["mask"].mean()) == learned == float(number)
        if number == 0:
            assert events == ["wait", "fetch 0", "go", "wait", "fetch 1", "go"][: 6 if ahead else 3]
        learned += 1


def test_ahead_and_split_teachers_do_not_go_together() -> None:
    shared = ["teachers.clip.shard=true", "data.shards=none"]
    assert load("maskalign_vit_b16", shared).teachers["clip"].shard
    with pytest.raises(UserError, match="engine.teachers_ahead = true with teachers.clip.shard = true"):
        load("maskalign_vit_b16", [*shared, "engine.teachers_ahead=true"])
