"""Checks a finished data set against its manifest: lengths, checksums, every member's place and label, the pictures."""

from __future__ import annotations

import hashlib
import multiprocessing
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from mimscale.data.decode import BadImage, decode
from mimscale.data.manifest import Manifest

CHUNK = 4 << 20


def verify(folder: Path, *, decode_all: bool, jobs: int = 1) -> Iterator[tuple[int, list[str]]]:
    """Per checked thing (the index files, then each shard): its samples, and one line per damage.

    Raises UserError if there is no readable manifest.
    """
    manifest = Manifest.load(folder, check_shards=False)
    for name, expected in manifest.file.index.items():
        if _sha256(manifest.folder / name) != expected:
            yield 0, [f"{name}: its checksum is not the manifest's"]
    if manifest.labels is not None:
        known = len(manifest.classes) if manifest.classes is not None else np.inf
        if manifest.labels.min() < 0 or manifest.labels.max() >= known:
            yield 0, [f"labels run from {manifest.labels.min()} to {manifest.labels.max()}, for {known} classes"]
    check = partial(_check_shard, manifest.folder, decode_all)
    numbers = range(len(manifest.counts))
    if jobs == 1:
        yield from map(check, numbers)
    else:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield from pool.map(check, numbers)


def _check_shard(folder: Path, decode_all: bool, number: int) -> tuple[int, list[str]]:
    manifest = Manifest.load(folder, check_shards=False)
    shard, path = manifest.file.shards[number], manifest.shard_paths[number]
    if not path.is_file():
        return shard.count, [f"{shard.name}: missing"]
    found = []
    if path.stat().st_size != shard.bytes:
        found.append(f"{shard.name}: {path.stat().st_size:,} bytes, not {shard.bytes:,}")
    try:
        checksum = _sha256(path)
    except OSError as error:
        return shard.count, [f"{shard.name}: cannot be read: {error.strerror}"]
    if checksum != shard.sha256:
        found.append(f"{shard.name}: its checksum is not the manifest's")
    first = int(manifest.counts[:number].sum())
    found += [f"{shard.name}: {line}" for line in _check_members(manifest, path, first, shard.count)]
    if decode_all:
        for sample in range(first, first + shard.count):
            try:
                decode(manifest.read(sample))
            except (OSError, BadImage) as error:
                found.append(f"{shard.name}: sample {sample} ({_name(manifest, sample)}): {error}")
    return shard.count, found


def _check_members(manifest: Manifest, path: Path, first: int, count: int) -> list[str]:
    """The archive's own headers against index and labels."""
    places, labels = [], []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.name.endswith(".cls"):
                    text = tar.extractfile(member)
                    labels.append(int(text.read()) if text else -1)
                else:
                    places.append((member.offset_data, member.size))
    except (OSError, ValueError, tarfile.TarError) as error:
        return [f"not readable as a tar archive after {len(places)} pictures: {error}"]
    rows = slice(first, first + count)
    found = []
    if len(places) != count:
        found.append(f"{len(places)} pictures, not {count}")
    elif places != list(zip(manifest.offsets[rows].tolist(), manifest.sizes[rows].tolist(), strict=True)):
        found.append("the index does not fit the members")
    if labels != ([] if manifest.labels is None else manifest.labels[rows].tolist()):
        found.append("the labels in the shard are not those of the manifest")
    return found


def _name(manifest: Manifest, sample: int) -> str:
    try:
        return manifest.key(sample)
    except (OSError, tarfile.TarError):
        return "name unreadable"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
