"""Damaged samples in the loader: the same substitutes for any ranks, full batches, and a list of the damage."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimscale.data import sample_reader as module
from mimscale.data.config import DataConfig
from mimscale.data.decode import MAX_PIXELS
from mimscale.data.loader import TrainLoader
from mimscale.data.manifest import Manifest
from mimscale.data.sample_reader import DamagedSample, substitutes
from mimscale.fault_tolerance.retrying_writer import RetryingWriter
from mimscale.monitoring.damage_log import DamageLog, default_limit
from mimscale.types import Batch, Damage, Needs

SEED, GLOBAL, STEPS = 5, 20, 4  # of 80 samples: exactly one epoch


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_PAUSES_S", (0.0,))


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Manifest:
    return Manifest.load(Path(shutil.copytree(shards, tmp_path / "copy")))


def overwrite(manifest: Manifest, sample: int, data: bytes, before: int = 0) -> set[int]:
    """Write data so many bytes before the start of an image."""
    with open(manifest.shard_paths[int(manifest.locate(sample)[0])], "r+b") as file:
        file.seek(int(manifest.offsets[sample]) - before)
        file.write(data)
    return {sample}


def samples_of_shard(manifest: Manifest, shard: int) -> set[int]:
    first = int(manifest.counts[:shard].sum())
    return set(range(first, first + int(manifest.counts[shard])))


def truncated(manifest: Manifest) -> set[int]:
    os.truncate(manifest.shard_paths[1], int(manifest.offsets[20]) + 5)
    return {sample for sample in samples_of_shard(manifest, 1) if sample >= 20}


def flipped_payload(manifest: Manifest) -> set[int]:
    return overwrite(manifest, 33, bytes(200))


def flipped_header(manifest: Manifest) -> set[int]:
    return overwrite(manifest, 34, b"\x81", before=500)


def flipped_index(manifest: Manifest) -> set[int]:
    index = np.load(manifest.folder / "index.npy")
    index[7, 0] += 1 << 9
    index[9, 1] -= 3
    index[11, 0] = -1
    np.save(manifest.folder / "index.npy", index)
    return {7, 9, 11}


def missing(manifest: Manifest) -> set[int]:
    manifest.shard_paths[2].unlink()
    return samples_of_shard(manifest, 2)


def swapped(manifest: Manifest) -> set[int]:
    """Another shard of exactly the same length: only the headers of its members differ."""
    one, other = manifest.shard_paths[0], manifest.shard_paths[4]
    size = one.stat().st_size
    data = other.read_bytes()
    one.write_bytes((data + bytes(size))[:size])
    return samples_of_shard(manifest, 0)


def empty(manifest: Manifest) -> set[int]:
    manifest.shard_paths[3].write_bytes(b"")
    return samples_of_shard(manifest, 3)


def decompression_bomb(manifest: Manifest) -> set[int]:
    """A small PNG whose header gives a huge size."""
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = MAX_PIXELS.to_bytes(4, "big") + (2).to_bytes(4, "big")
    return overwrite(manifest, 50, bytes(data))


def batches(folder: Path, world: int = 1, workers: int = 0) -> list[Batch]:
    data = DataConfig(shards=folder, image_size=32, workers=workers, streams=4, block=8)
    needs = Needs(labels=True)
    found = []
    for rank in range(world):
        manifest = Manifest.load(folder, check_shards=False)
        loader = TrainLoader(
            manifest, data, needs, seed=SEED, global_batch=GLOBAL, micro_batch=GLOBAL // world, rank=rank, world=world
        )
        found += list(islice(loader, STEPS))
        loader.close()
    return found


def by_position(found: list[Batch], field: str) -> dict[int, object]:
    rows = [dict(zip(b.positions.tolist(), getattr(b, field).tolist(), strict=True)) for b in found]
    return {position: value for row in rows for position, value in row.items()}


KINDS = [truncated, flipped_payload, flipped_header, flipped_index, missing, swapped, empty, decompression_bomb]


@pytest.mark.parametrize("damage_copy", KINDS, ids=lambda kind: kind.__name__)
def test_batches_stay_full_and_the_damage_is_listed(
    damage_copy: Callable[[Manifest], set[int]], copy: Manifest, shards: Path
) -> None:
    expected = by_position(batches(shards), "ids")
    damaged = damage_copy(copy)
    found = batches(copy.folder)
    assert [len(batch.ids) for batch in found] == [GLOBAL] * STEPS
    ids = by_position(found, "ids")
    for position, sample in expected.items():
        if sample in damaged:
            choices = substitutes(80, SEED, *divmod(position, 80)).tolist()
            assert ids[position] == next(choice for choice in choices if choice not in damaged)
        else:
            assert ids[position] == sample
    listed = {damage.sample: damage for batch in found for damage in batch.damage}
    assert set(listed) == damaged
    for damage in listed.values():
        assert damage.shard == copy.file.shards[int(copy.locate(damage.sample)[0])].name and damage.reason
    labels = by_position(found, "labels")
    assert copy.labels is not None and all(labels[p] == copy.labels[i] for p, i in ids.items())  # type: ignore[call-overload]


def test_substitutes_do_not_depend_on_the_ranks(copy: Manifest) -> None:
    flipped_payload(copy)
    copy.shard_paths[0].unlink()
    one = batches(copy.folder)
    two = batches(copy.folder, world=2)
    assert by_position(two, "ids") == by_position(one, "ids")
    assert by_position(two, "images") == by_position(one, "images")
    assert {d for b in two for d in b.damage} == {d for b in one for d in b.damage}


@pytest.mark.multi
def test_workers_send_the_list(copy: Manifest) -> None:
    damaged = flipped_payload(copy)
    found = batches(copy.folder, workers=1)
    assert {d.sample for b in found for d in b.damage} == damaged
    key = next(d.key for b in found for d in b.damage)
    assert key == copy.key(33)


def test_an_error_if_nothing_can_be_read(copy: Manifest) -> None:
    for path in copy.shard_paths:
        path.write_bytes(b"")
    with pytest.raises(DamagedSample, match="data_prep verify"):
        batches(copy.folder)


def damage(sample: int) -> Damage:
    return Damage(sample, "shard-000000.tar", f"key{sample}", "why")


def test_the_damage_log_counts_each_sample_once_over_ranks_and_launches(tmp_path: Path) -> None:
    path = tmp_path / "damaged.jsonl"
    damage_log, other = DamageLog(path, 2, RetryingWriter()), DamageLog(path, 2)
    damage_log.add([damage(4), damage(1), damage(4)])
    other.add([damage(1)])
    parts = [damage_log.take(), other.take()]
    assert [d.sample for d in damage_log.merge(parts)] == [1, 4] == [d.sample for d in other.merge(parts)]
    damage_log.add([damage(4)])
    assert damage_log.merge([damage_log.take()]) == [] and (damage_log.total, damage_log.full) == (2, False)
    with path.open("a") as file:
        file.write('{"sample": 7, "sha')  # a run that was killed here
    later = DamageLog(path, 2, RetryingWriter())
    assert later.total == 2
    later.merge([[damage(9)]])
    assert later.full and "3 samples cannot be used, data.max_damaged allows 2" in later.verdict()
    assert "\n" not in later.verdict() and "key1 (why)" in later.verdict()
    assert DamageLog(path, 5).total == 3


def test_lines_that_cannot_be_written_are_written_later(tmp_path: Path) -> None:
    path = tmp_path / "damaged.jsonl"
    writer = RetryingWriter()
    damage_log = DamageLog(path, 5, writer)
    path.mkdir()  # any file that cannot be written
    assert [d.sample for d in damage_log.merge([[damage(3)]])] == [3]
    path.rmdir()
    assert writer.flush() == []
    assert DamageLog(path, 5).total == 1 and damage_log.merge([[]]) == []
    assert len(path.read_text().splitlines()) == 1


def test_default_limit() -> None:
    assert default_limit(50_000) == 10 and default_limit(1_281_167) == 128
