"""The data set on disk: reading samples by id, the fingerprint, and what is refused."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimscale.data import shard_files as shards_module
from mimscale.data.manifest import Manifest
from mimscale.errors import UserError


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def test_reads_the_members_of_the_shards(manifest: Manifest) -> None:
    expected = []
    for path in manifest.shard_paths:
        with tarfile.open(path) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        expected += [
            (os.path.splitext(n)[0], data, int(members[os.path.splitext(n)[0] + ".cls"]))
            for n, data in members.items()
            if n.endswith(".jpg")
        ]
    assert len(expected) == manifest.samples == 80 and manifest.labels is not None
    for sample, (key, data, label) in enumerate(expected):
        assert (manifest.key(sample), manifest.read(sample), manifest.labels[sample]) == (key, data, label)
    assert manifest.classes == [f"class_{label:03d}" for label in range(4)]


def test_locate(manifest: Manifest) -> None:
    shards, rows = manifest.locate(np.arange(80))
    expected = [(shard, row) for shard, count in enumerate(manifest.counts) for row in range(count)]
    assert list(zip(shards.tolist(), rows.tolist(), strict=True)) == expected
    for wrong in (-1, 80):
        with pytest.raises(IndexError):
            manifest.locate([wrong])
        with pytest.raises(IndexError):
            manifest.read(wrong)


def test_fingerprint_depends_on_content_and_not_on_location(manifest: Manifest, copy: Path) -> None:
    assert Manifest.load(copy / "manifest.json").fingerprint == manifest.fingerprint
    file = json.loads((copy / "manifest.json").read_text())
    shards = [{**file["shards"][0], "sha256": "0" * 64}, *file["shards"][1:]]
    irrelevant: list[dict[str, Any]] = [{"source": {"kind": "folder", "path": "/elsewhere"}}, {"options": {}}]
    relevant: list[dict[str, Any]] = [
        {"shards": shards},
        {"classes": ["a", "b", "c", "d"]},
        {"index": {**file["index"], "index.npy": "0"}},
    ]
    for change in irrelevant + relevant:
        (copy / "manifest.json").write_text(json.dumps({**file, **change}))
        found = Manifest.load(copy, check_shards="index" not in change).fingerprint
        assert (found == manifest.fingerprint) == (change in irrelevant)


@pytest.mark.parametrize("name", ["index.npy", "labels.npy"])
def test_a_changed_index_is_refused(copy: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray((copy / name).read_bytes())
    data[-8] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name}' has the sha256 .* as manifest.json says; copy it again") as caught:
        Manifest.load(copy)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("LOCAL_RANK", "1")  # only local rank 0 checks
    Manifest.load(copy)


def test_open_files_are_bounded_and_threads_may_share_a_manifest(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, shards: Path
) -> None:
    expected = [manifest.read(sample) for sample in range(80)]
    monkeypatch.setattr(shards_module, "OPEN_SHARDS", 2)
    small, before = Manifest.load(shards), len(os.listdir("/proc/self/fd"))

    def read(seed: int) -> bool:
        return all(
            small.read(sample) == expected[sample] for sample in np.random.default_rng(seed).integers(0, 80, 300)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))
    assert len(os.listdir("/proc/self/fd")) - before <= 2
    small.close()
    assert len(os.listdir("/proc/self/fd")) == before


def _read_all(manifest: Manifest, results) -> None:
    results.put([manifest.read(sample) for sample in range(manifest.samples)])


@pytest.mark.multi
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same(manifest: Manifest, method: str) -> None:
    expected = [manifest.read(sample) for sample in range(80)]  # leaves files open for the fork
    context: Any = multiprocessing.get_context(method)
    results = context.Queue()
    children = [context.Process(target=_read_all, args=(manifest, results)) for _ in range(2)]
    for child in children:
        child.start()
    assert [results.get() for _ in children] == [expected, expected]
    for child in children:
        child.join()
    assert manifest.read(79) == expected[79]


def test_a_pickled_manifest_is_small(manifest: Manifest) -> None:
    assert len(pickle.dumps(manifest)) < 500
    assert pickle.loads(pickle.dumps(manifest)).read(7) == manifest.read(7)


def test_missing_files_are_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        Manifest.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        Manifest.load(tmp_path)
    (copy / "shard-000002.tar").rename(copy / "away")
    with pytest.raises(UserError, match=r"shard-000002\.tar' is missing"):
        Manifest.load(copy)
    (copy / "away").rename(copy / "shard-000002.tar")
    with open(copy / "shard-000003.tar", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"shard-000003\.tar' has \d+ bytes, not \d+"):
        Manifest.load(copy)


def test_damaged_files_are_refused(copy: Path) -> None:
    text = (copy / "manifest.json").read_text()
    values = json.loads(text)
    outside = [{**values["shards"][0], "name": "../secret.tar"}, *values["shards"][1:]]
    wrong = [text[:100], "[]", "{}", *({**values, **c} for c in ({"format": 2}, {"extra": 1}, {"shards": outside}))]
    for damaged in wrong:
        (copy / "manifest.json").write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
        with pytest.raises(UserError, match=r"manifest\.json' is damaged") as caught:
            Manifest.load(copy)
        assert "\n" not in str(caught.value)
    (copy / "manifest.json").write_text(json.dumps({**values, "samples": 81}))
    with pytest.raises(UserError, match="contradicts itself"):
        Manifest.load(copy)
    (copy / "manifest.json").write_text(text)
    np.save(copy / "labels.npy", np.arange(80, dtype=np.int32))
    with pytest.raises(UserError, match=r"labels\.npy' holds int32 \(80,\), not int64"):
        Manifest.load(copy)
    np.save(copy / "labels.npy", np.array([{}] * 80, dtype=object), allow_pickle=True)  # must never be unpickled
    with pytest.raises(UserError, match=r"labels\.npy' is missing or damaged"):
        Manifest.load(copy)


def test_a_truncated_shard_is_an_error(copy: Path) -> None:
    manifest = Manifest.load(copy)
    os.truncate(copy / "shard-000000.tar", int(manifest.offsets[3]) + 10)
    with pytest.raises(OSError, match="ends early: 10 of"):
        manifest.read(3)


@pytest.mark.parametrize(("column", "value"), [(0, 2**40), (1, 2**40), (1, 2**62), (0, -(2**40)), (1, -1)])
def test_numbers_of_an_index_that_no_shard_has(column: int, value: int, copy: Path) -> None:
    """With the checksum that belongs to them: one sample is damaged, and no memory is taken for it."""
    index = np.load(copy / "index.npy")
    index[3, column] = value
    np.save(copy / "index.npy", index)
    file = json.loads((copy / "manifest.json").read_text())
    file["index"]["index.npy"] = hashlib.sha256((copy / "index.npy").read_bytes()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(file))
    manifest = Manifest.load(copy)
    with pytest.raises(OSError, match=r"shard-000000\.tar"):
        manifest.read(3)
    assert manifest.read(2)


@pytest.mark.parametrize("name", ["../../../../etc/hostname", "..", "/dev/zero", "other.npy", "pipe.npy"])
def test_a_manifest_names_only_its_own_files(name: str, copy: Path) -> None:
    """What another name points to is neither opened nor hashed: a pipe or a device would never end."""
    os.mkfifo(copy / "pipe.npy")
    file = json.loads((copy / "manifest.json").read_text())
    file["index"][name] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(file))
    with pytest.raises(UserError, match=r"manifest\.json' is damaged") as caught:
        Manifest.load(copy)
    assert "0" * 12 not in str(caught.value)


@pytest.mark.parametrize("name", ["manifest.json", "index.npy", "labels.npy"])
def test_a_pipe_in_the_place_of_a_file_is_refused(name: str, copy: Path) -> None:
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(UserError, match=f"{name}' is (not a regular file|missing or damaged)"):
        Manifest.load(copy)
