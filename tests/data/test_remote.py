"""Shards on servers that misbehave: the same batches as from the local folder, and a cache that stays sound."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from data_prep.existing import index_shards
from mimscale.data import sample_reader as reader_module
from mimscale.data import storage as storage_module
from mimscale.data.config import DataConfig
from mimscale.data.decode import decode
from mimscale.data.loader import TrainLoader
from mimscale.data.manifest import Manifest
from mimscale.data.order import Order, rank_positions
from mimscale.data.sample_reader import Reader
from mimscale.data.shard_cache import Cache
from mimscale.data.shard_prefetch import upcoming, within
from mimscale.data.storage import storage
from mimscale.errors import UserError
from mimscale.types import Batch, Needs
from tests.data.servers import Web, bucket

GIB = 1 << 30


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "PAUSE_S", 0.01)
    monkeypatch.setattr(reader_module, "PAUSES_S", (0.01, 0.01))
    monkeypatch.setattr(storage_module, "TIMEOUT_S", 0.3)


@pytest.fixture
def web(shards: Path) -> Iterator[Web]:
    server = Web(shards)
    yield server
    server.stop()


def batches(manifest: Manifest, steps: int = 4, workers: int = 0) -> list[Batch]:
    data = DataConfig(shards=manifest.place, image_size=32, workers=workers, streams=4, block=8)
    loader = TrainLoader(manifest, data, Needs(labels=True), seed=1, global_batch=20, micro_batch=20, rank=0, world=1)
    found = list(islice(loader, steps))
    loader.close()
    return found


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    pairs = list(zip(ours, theirs, strict=True))
    return all(torch.equal(a.images, b.images) and torch.equal(a.ids, b.ids) and not a.damage for a, b in pairs)


def fill(manifest: Manifest) -> None:
    for shard in range(len(manifest.counts)):
        assert manifest.fetch(shard)


def test_a_web_server_gives_the_same_batches(web: Web, shards: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(web.place, cache=Cache(tmp_path, GIB))
    local = Manifest.load(shards)
    assert manifest.fingerprint == local.fingerprint and manifest.labels is not None
    assert same(batches(manifest, 2), batches(local, 2))


@pytest.mark.parametrize("fault", ["500", "stall", "cut", "wrong"])
def test_faults_of_a_server_are_survived(fault: str, web: Web, shards: Path, tmp_path: Path) -> None:
    """Samples are read one by one here; each fault hits a first try."""
    manifest = Manifest.load(web.place, cache=Cache(tmp_path, GIB))
    web.faults = [fault, "", fault]
    assert all(manifest_read(manifest, sample) for sample in range(4))
    web.faults = [fault]
    if fault == "wrong":
        with pytest.raises(OSError, match="sha256"):
            manifest.fetch(0)
        assert list((tmp_path / "shards").iterdir()) == []
    assert manifest.fetch(0) and not web.faults
    assert manifest.cache is not None
    copy = manifest.cache.path(manifest.shard_key(0))
    assert hashlib.sha256(copy.read_bytes()).hexdigest() == copy.stem == manifest.file.shards[0].sha256


def manifest_read(manifest: Manifest, sample: int) -> bool:
    return Reader(manifest, decode).load(sample).width > 0


def test_a_server_may_restart(web: Web, shards: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(web.place, cache=Cache(tmp_path, GIB))
    fill(manifest)
    web.stop()
    assert same(batches(manifest, 2), batches(Manifest.load(shards), 2))  # all of it from the copies
    assert manifest.cache is not None
    manifest.cache.drop(manifest.shard_key(1))
    with pytest.raises(OSError, match="refused"):
        manifest.fetch(1)
    web.start()
    assert manifest.fetch(1) and not list((tmp_path / "shards").glob(".*"))


def test_a_server_that_fails_now_and_then_can_be_opened(web: Web, tmp_path: Path) -> None:
    web.refused = 3
    assert Manifest.load(web.place, cache=Cache(tmp_path, GIB)).read(0) and web.refused == 0
    with pytest.raises(UserError, match="404"):
        Manifest.load(f"{web.place}/nowhere", cache=Cache(tmp_path, GIB))


def test_shards_without_checksums_have_names_of_their_own(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sets under the same relative path, as two projects on one node have them."""
    cache, contents = Cache(tmp_path / "cache", GIB), []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for path in shards.glob("*.tar"):
            shutil.copy(path, tmp_path / name / path.name)
        with open(tmp_path / name / "shard-000000.tar", "r+b") as file:
            file.seek(1700)
            file.write(name.encode())
        index_shards(tmp_path / name, label=None)
        monkeypatch.chdir(tmp_path / name)
        manifest = Manifest.load(".", cache=cache)
        assert manifest.file.shards[0].sha256 is None
        fill(manifest)
        contents.append(manifest.read(0))
        assert contents[-1] == Manifest.load(tmp_path / name).read(0)
    assert contents[0] != contents[1]


def test_s3_gives_the_same_batches(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "TIMEOUT_S", 10.0)
    with bucket(shards, monkeypatch) as place:
        manifest = Manifest.load(place, cache=Cache(tmp_path, GIB))
        assert manifest.read(3) == Manifest.load(shards).read(3)
        fill(manifest)
        assert same(batches(manifest, 1), batches(Manifest.load(shards), 1))
        with pytest.raises(OSError, match="s3://images/train/none"):
            storage(place).read("none", 0, 4)


@pytest.mark.multi
def test_the_next_shards_come_into_the_cache_by_themselves(web: Web, shards: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(web.place, cache=Cache(tmp_path, GIB))
    data = DataConfig(shards=web.place, image_size=32, workers=1, streams=4, block=8)
    loader = TrainLoader(manifest, data, Needs(), seed=1, global_batch=20, micro_batch=20, rank=0, world=1)
    running = iter(loader)
    found = [next(running)]
    end = time.monotonic() + 60
    while len(list((tmp_path / "shards").glob("*.tar"))) < 5 and time.monotonic() < end:
        time.sleep(0.05)
    found += list(islice(running, 3))
    loader.close()
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 5
    whole = [name for name, size in web.gets if size == (shards / name).stat().st_size]
    assert sorted(whole) == sorted(set(whole))  # none was fetched twice
    assert same(found, batches(Manifest.load(shards)))


def test_a_damaged_copy_is_dropped_and_read_from_the_source(web: Web, shards: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(web.place, cache=Cache(tmp_path, GIB))
    fill(manifest)
    for shard in range(5):
        assert manifest.cache is not None
        path = manifest.cache.path(manifest.shard_key(shard))
        path.write_bytes(bytes(path.stat().st_size))
    assert same(batches(manifest), batches(Manifest.load(shards)))
    assert not list((tmp_path / "shards").glob("*.tar"))


def entry(number: int) -> tuple[str, bytes]:
    data = bytes([number]) * 1000
    return hashlib.sha256(data).hexdigest(), data


def put(cache: Cache, number: int) -> bool:
    key, data = entry(number)
    return cache.fetch(key, len(data), key, lambda offset, size: data[offset : offset + size])


def test_the_limit_holds_and_what_is_needed_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 3500)
    assert put(cache, 0) and put(cache, 1) and put(cache, 2)
    cache.want([entry(0)[0]])
    held = os.open(cache.path(entry(1)[0]), os.O_RDONLY)
    assert put(cache, 3)
    assert cache.path(entry(0)[0]).exists() and not cache.path(entry(1)[0]).exists()
    assert os.pread(held, 2000, 0) == entry(1)[1]  # an open reader is not disturbed
    os.close(held)
    cache.want([entry(n)[0] for n in (0, 2, 3)])
    assert not put(cache, 4) and len(list((tmp_path / "shards").iterdir())) == 3


def test_a_full_disk_leaves_nothing_half(tmp_path: Path) -> None:
    if not os.access("/dev/full", os.W_OK):
        pytest.skip("no /dev/full here")
    cache = Cache(tmp_path, GIB)
    key, data = entry(7)
    (tmp_path / "shards" / f".{key}.{len(data)}.{os.getpid()}.tmp").symlink_to("/dev/full")
    assert not cache.fetch(key, len(data), key, lambda offset, size: data[offset : offset + size])
    assert list((tmp_path / "shards").iterdir()) == [] and put(cache, 7)


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    cache, key = Cache(tmp_path, 1500), entry(0)[0]
    dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True).stdout.strip()
    (tmp_path / "shards" / f".{key}.1400.{dead}.tmp").write_bytes(bytes(1400))
    (tmp_path / "wanted" / dead).write_text(json.dumps([key]))
    assert put(cache, 0)
    assert [p.name for p in (tmp_path / "shards").iterdir()] == [f"{key}.tar"]
    assert put(cache, 1) and not cache.path(key).exists()  # the dead want nothing


def test_two_processes_do_not_fetch_the_same(tmp_path: Path) -> None:
    one, two, key = Cache(tmp_path, GIB), Cache(tmp_path, GIB), entry(0)[0]
    got = []

    def read(offset: int, size: int) -> bytes:
        got.append(two.fetch(key, 1000, key, read))
        return entry(0)[1][offset : offset + size]

    assert one.fetch(key, 1000, key, read) and got == [False]


def test_what_is_being_fetched_counts_whole(tmp_path: Path) -> None:
    one, two, key = Cache(tmp_path, 1500), Cache(tmp_path, 1500), entry(0)[0]
    got = []

    def read(offset: int, size: int) -> bytes:
        got.append(put(two, 1))  # nothing of the first is on the disk yet
        return entry(0)[1][offset : offset + size]

    assert one.fetch(key, 1000, key, read) and got == [False]


def test_what_comes_next_is_known() -> None:
    order = Order([8] * 40, 3, 4, 16)

    class Counts:
        @staticmethod
        def locate(ids):
            return ids // 8, ids % 8

    shards = list(upcoming(Counts, order, 16, 1, 2, 5))  # type: ignore[arg-type]
    met = [int(i) // 8 for step in range(5, 20) for i in order.ids(rank_positions(step, 16, 1, 2))]
    first_met = list(dict.fromkeys(met))
    assert set(shards) == set(range(40)) and set(shards[:4]) <= set(first_met)
    assert within(iter(shards), [10] * 40, 35) == shards[:3]


@pytest.mark.parametrize(
    ("place", "rule"),
    [
        ("pipe:cat x://y", "cannot be read"),
        ("ftp://host/x", "cannot be read; use a folder or one of http"),
        ("s3://key:secret@bucket/x", "credentials in it"),
        ("https://host/x?token=secret", "credentials in it"),
        ("http://127.0.0.1:9/x", "cannot be opened"),
    ],
)
def test_addresses_that_are_refused(place: str, rule: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rule) as caught:
        Manifest.load(place, cache=Cache(tmp_path, GIB))
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_an_address_needs_a_cache(web: Web, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="set data.cache"):
        Manifest.load(web.place)
    web.folder = Path(shutil.copytree(shards, tmp_path / "copy"))
    (web.folder / "shard-000001.tar").write_bytes(b"")
    with pytest.raises(UserError, match="has 0 bytes, not"):
        Manifest.load(web.place, cache=Cache(tmp_path / "cache", GIB))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        Cache.of(DataConfig(shards=web.place, cache=tmp_path / "file"))
