"""Shards on servers that fail: the same batches as from a local folder, and a cache of complete shards only."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import islice
from pathlib import Path

import pytest
import torch

from data_prep.index import IndexOptions, index_shards
from data_prep.shard_list import list_shards
from mimscale.data import sample_reader as reader_module
from mimscale.data import storage as storage_module
from mimscale.data.config import DataConfig
from mimscale.data.decode import decode
from mimscale.data.loader import TrainLoader
from mimscale.data.manifest import Manifest
from mimscale.data.order import Order, rank_positions
from mimscale.data.sample_reader import SampleReader
from mimscale.data.shard_cache import Cache
from mimscale.data.shard_prefetch import first_within_budget, upcoming_shards
from mimscale.data.storage import storage
from mimscale.errors import UserError, without_secrets
from mimscale.types import Batch, Needs
from tests.data.servers import WebServer, bucket

GIB = 1 << 30


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "PAUSE_S", 0.01)
    monkeypatch.setattr(reader_module, "RETRY_PAUSES_S", (0.01, 0.01))
    monkeypatch.setattr(storage_module, "TIMEOUT_S", 0.3)


@pytest.fixture
def web(shards: Path) -> Iterator[WebServer]:
    server = WebServer(shards)
    yield server
    server.stop()


def batches(manifest: Manifest, steps: int = 4, workers: int = 0) -> list[Batch]:
    data = DataConfig(shards=manifest.location, image_size=32, workers=workers, streams=4, block=8)
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


def test_a_web_server_gives_the_same_batches(web: WebServer, shards: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(web.url, cache=Cache(tmp_path, GIB))
    local = Manifest.load(shards)
    assert manifest.fingerprint == local.fingerprint and manifest.labels is not None
    assert same(batches(manifest, 2), batches(local, 2))


@pytest.mark.parametrize("fault", ["500", "stall", "truncate", "zeros"])
def test_failed_requests_are_repeated(fault: str, web: WebServer, shards: Path, tmp_path: Path) -> None:
    """Each fault hits the first try of a sample."""
    manifest = Manifest.load(web.url, cache=Cache(tmp_path, GIB))
    web.faults = [fault, "", fault]
    assert all(can_be_read(manifest, sample) for sample in range(4))
    web.faults = [fault]
    if fault == "zeros":
        with pytest.raises(OSError, match="sha256"):
            manifest.fetch(0)
        assert list((tmp_path / "shards").iterdir()) == []
    assert manifest.fetch(0) and not web.faults
    assert manifest.cache is not None
    copy = manifest.cache.path(manifest.shard_key(0))
    assert hashlib.sha256(copy.read_bytes()).hexdigest() == copy.stem == manifest.file.shards[0].sha256


def can_be_read(manifest: Manifest, sample: int) -> bool:
    return SampleReader(manifest, decode).load(sample).width > 0


def test_a_server_may_restart(web: WebServer, shards: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(web.url, cache=Cache(tmp_path, GIB))
    fill(manifest)
    web.stop()
    assert same(batches(manifest, 2), batches(Manifest.load(shards), 2))  # from the cache
    assert manifest.cache is not None
    manifest.cache.remove(manifest.shard_key(1))
    with pytest.raises(OSError, match="refused"):
        manifest.fetch(1)
    web.start()
    assert manifest.fetch(1) and not list((tmp_path / "shards").glob(".*"))


def test_a_manifest_is_loaded_in_spite_of_failed_requests(web: WebServer, tmp_path: Path) -> None:
    web.refused = 3
    assert Manifest.load(web.url, cache=Cache(tmp_path, GIB)).read(0) and web.refused == 0
    with pytest.raises(UserError, match="404"):
        Manifest.load(f"{web.url}/nowhere", cache=Cache(tmp_path, GIB))


def test_shards_without_checksums_have_distinct_cache_keys(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two data sets under the same relative path, as two projects on one node may have."""
    cache, contents = Cache(tmp_path / "cache", GIB), []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for path in shards.glob("*.tar"):
            shutil.copy(path, tmp_path / name / path.name)
        with open(tmp_path / name / "shard-000000.tar", "r+b") as file:
            file.seek(1700)
            file.write(name.encode())
        index_shards(list_shards(str(tmp_path / name)), IndexOptions())
        monkeypatch.chdir(tmp_path / name)
        manifest = Manifest.load(".", cache=cache)
        assert manifest.file.shards[0].sha256 is None
        fill(manifest)
        contents.append(manifest.read(0))
        assert contents[-1] == Manifest.load(tmp_path / name).read(0)
    assert contents[0] != contents[1]


def test_s3_gives_the_same_batches(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "TIMEOUT_S", 10.0)
    with bucket(shards, monkeypatch) as url:
        manifest = Manifest.load(url, cache=Cache(tmp_path, GIB))
        assert manifest.read(3) == Manifest.load(shards).read(3)
        fill(manifest)
        assert same(batches(manifest, 1), batches(Manifest.load(shards), 1))
        with pytest.raises(OSError, match="s3://images/train/none"):
            storage(url).read("none", 0, 4)


@pytest.mark.multi
def test_the_next_shards_are_prefetched(web: WebServer, shards: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(web.url, cache=Cache(tmp_path, GIB))
    data = DataConfig(shards=web.url, image_size=32, workers=1, streams=4, block=8)
    loader = TrainLoader(manifest, data, Needs(), seed=1, global_batch=20, micro_batch=20, rank=0, world=1)
    iterator = iter(loader)
    found = [next(iterator)]
    end = time.monotonic() + 60
    while len(list((tmp_path / "shards").glob("*.tar"))) < 5 and time.monotonic() < end:
        time.sleep(0.05)
    found += list(islice(iterator, 3))
    loader.close()
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 5
    complete = [name for name, size in web.gets if size == (shards / name).stat().st_size]
    assert sorted(complete) == sorted(set(complete))  # none was copied twice
    assert same(found, batches(Manifest.load(shards)))


def test_a_damaged_copy_is_removed_and_the_original_read(web: WebServer, shards: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(web.url, cache=Cache(tmp_path, GIB))
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


def fetch(cache: Cache, number: int) -> bool:
    key, data = entry(number)
    return cache.fetch(key, len(data), key, lambda offset, size: data[offset : offset + size])


def test_eviction_keeps_the_limit_and_the_wanted_shards(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 3500)
    assert fetch(cache, 0) and fetch(cache, 1) and fetch(cache, 2)
    cache.set_wanted([entry(0)[0]])
    held = os.open(cache.path(entry(1)[0]), os.O_RDONLY)
    assert fetch(cache, 3)
    assert cache.path(entry(0)[0]).exists() and not cache.path(entry(1)[0]).exists()
    assert os.pread(held, 2000, 0) == entry(1)[1]  # an open file stays readable
    os.close(held)
    cache.set_wanted([entry(n)[0] for n in (0, 2, 3)])
    assert not fetch(cache, 4) and len(list((tmp_path / "shards").iterdir())) == 3


def test_a_full_disk_leaves_no_partial_shard(tmp_path: Path) -> None:
    if not os.access("/dev/full", os.W_OK):
        pytest.skip("no /dev/full here")
    cache = Cache(tmp_path, GIB)
    key, data = entry(7)
    (tmp_path / "shards" / f".{key}.{len(data)}.{os.getpid()}.tmp").symlink_to("/dev/full")
    assert not cache.fetch(key, len(data), key, lambda offset, size: data[offset : offset + size])
    assert list((tmp_path / "shards").iterdir()) == [] and fetch(cache, 7)


def test_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    cache, key = Cache(tmp_path, 1500), entry(0)[0]
    dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True).stdout.strip()
    (tmp_path / "shards" / f".{key}.1400.{dead}.tmp").write_bytes(bytes(1400))
    (tmp_path / "wanted" / dead).write_text(json.dumps([key]))
    assert fetch(cache, 0)
    assert [p.name for p in (tmp_path / "shards").iterdir()] == [f"{key}.tar"]
    assert fetch(cache, 1) and not cache.path(key).exists()  # the list of a dead process does not count


def test_two_processes_do_not_copy_the_same_shard(tmp_path: Path) -> None:
    one, two, key = Cache(tmp_path, GIB), Cache(tmp_path, GIB), entry(0)[0]
    got = []

    def read(offset: int, size: int) -> bytes:
        got.append(two.fetch(key, 1000, key, read))
        return entry(0)[1][offset : offset + size]

    assert one.fetch(key, 1000, key, read) and got == [False]


def test_a_shard_that_is_being_copied_counts_with_its_full_size(tmp_path: Path) -> None:
    one, two, key = Cache(tmp_path, 1500), Cache(tmp_path, 1500), entry(0)[0]
    got = []

    def read(offset: int, size: int) -> bytes:
        got.append(fetch(two, 1))  # nothing of the first is on the disk yet
        return entry(0)[1][offset : offset + size]

    assert one.fetch(key, 1000, key, read) and got == [False]


def test_upcoming_shards() -> None:
    order = Order([8] * 40, 3, 4, 16)

    class Counts:
        @staticmethod
        def locate(ids):
            return ids // 8, ids % 8

    shards = list(upcoming_shards(Counts, order, 16, 1, 2, 5))  # type: ignore[arg-type]
    met = [int(i) // 8 for step in range(5, 20) for i in order.ids(rank_positions(step, 16, 1, 2))]
    first_met = list(dict.fromkeys(met))
    assert set(shards) == set(range(40)) and set(shards[:4]) <= set(first_met)
    assert first_within_budget(iter(shards), [10] * 40, 35) == shards[:3]


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("pipe:cat x://y", "cannot be read"),
        ("ftp://host/x", "cannot be read; use a folder or one of http"),
        ("s3://key:secret@bucket/x", "credentials in it"),
        ("https://host/x?token=secret", "credentials in it"),
        ("https://host/x#secret", "credentials in it"),
        ("https://secret@host/x/manifest.json", "credentials in it"),
        ("http://127.0.0.1:9/x", "cannot be opened"),
    ],
)
def test_urls_that_are_refused(url: str, rule: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rule) as caught:
        Manifest.load(url, cache=Cache(tmp_path, GIB))
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_url_needs_a_cache(web: WebServer, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="set data.cache"):
        Manifest.load(web.url)
    web.folder = Path(shutil.copytree(shards, tmp_path / "copy"))
    (web.folder / "shard-000001.tar").write_bytes(b"")
    with pytest.raises(UserError, match="has 0 bytes, not"):
        Manifest.load(web.url, cache=Cache(tmp_path / "cache", GIB))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        Cache.from_config(DataConfig(shards=web.url, cache=tmp_path / "file"))


def test_a_server_that_redirects_elsewhere_is_not_followed(tmp_path: Path) -> None:
    """To ftp:// urllib would go, and a redirect may carry a signature, which is not printed."""

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", "ftp://127.0.0.1:9/x?signature=secret")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(OSError, match="redirects to ftp://127.0.0.1:9/x which is not http") as caught:
            storage(f"http://127.0.0.1:{server.server_port}").read("manifest.json", 0, 10)
        assert "secret" not in str(caught.value)
        server.shutdown()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pw@host:80/a/b.tar?X-Sig=1&y=2#z", "https://host:80/a/b.tar"),
        ("'s3://key:secret@bucket/x': denied", "'s3://bucket/x': denied"),
        ("wds:https://t@h/a-{0..3}.tar?q=1::http://h/b.tar?s", "wds:https://h/a-{0..3}.tar::http://h/b.tar"),
        ("wds:https://h/a.tar::https://u:pw@h2/b.tar", "wds:https://h/a.tar::https://h2/b.tar"),
        ("{https://u:pw@h/a,https://u:pw@h/b}", "{https://h/a,https://h/b}"),
        ("https:/user:pw@host/a.pth?sig=1 is absent", "https:/host/a.pth is absent"),  # of pathlib
        ("/cwd/s3:/key:pw@bucket/x", "/cwd/s3:/bucket/x"),
        ("s3://AKIA:a/b+c?d@bucket/x", "s3://bucket/x"),
        ("'https://user:p'a\"s|s@host/x': denied", "'https://host/x': denied"),
        ("'s3://bucket' and 'you@host', \"s3://b\"", "'s3://bucket' and 'you@host', \"s3://b\""),
        ("https://a:b'c@h/x|https://d:e|f@h/y", "https://h/x|https://h/y"),
        ("https://host:8080/a@b/x?e=f@g", "https://host:8080/a@b/x"),
        ("http://[::1]:80/a@b?token=pw", "http://[::1]:80/a@b"),
        ("HTTPS://user@host", "HTTPS://host"),
        ("n1:/export/x@y, C:/a?b", "n1:/export/x@y, C:/a?b"),
        ("a mail to me@host, 50 % of x?", "a mail to me@host, 50 % of x?"),
        ("https://host", "https://host"),
        pytest.param("a" * 300_000, "a" * 300_000, id="long"),  # in quadratic time an hour
    ],
)
def test_addresses_are_shown_without_secrets(text: str, shown: str) -> None:
    assert without_secrets(text) == shown and str(UserError(text)) == shown
