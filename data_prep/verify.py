"""Checks a finished data set against its manifest: lengths, checksums, every member's place and label, the pictures."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.existing import sha256
from data_prep.samples import find_samples
from data_prep.tar import opened
from mimscale.data.decode import BadImage, decode
from mimscale.data.manifest import Manifest
from mimscale.errors import UserError

EDGE = 4096  # bytes at both ends of a picture by which it is first compared with others


class Checked(NamedTuple):
    """samples: how many. damage: one line per fault. marks: uint64 [samples], the same for the same pictures."""

    samples: int
    damage: list[str]
    marks: NDArray[np.uint64]


def verify(folder: Path, *, decode_all: bool, jobs: int = 1) -> Iterator[Checked]:
    """The index files, then each shard. Raises UserError if there is no readable manifest."""
    manifest = Manifest.load(folder, check_shards=False)
    yield Checked(0, list(_check_index(manifest)), np.empty(0, np.uint64))
    check = partial(_check_shard, manifest.folder, decode_all)
    numbers = range(len(manifest.counts))
    if jobs == 1:
        yield from map(check, numbers)
    else:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield from pool.map(check, numbers)


def duplicates(manifest: Manifest, marks: NDArray[np.uint64]) -> list[list[int]]:
    """Groups of samples with the same bytes. marks: uint64 [N] from `verify`; where they are equal, contents decide.

    Raises OSError.
    """
    order = np.argsort(marks, kind="stable")
    cuts = np.flatnonzero(np.diff(marks[order])) + 1
    groups = []
    for alike in np.split(order, cuts):
        if len(alike) > 1:
            by_content: dict[bytes, list[int]] = {}
            for sample in alike.tolist():
                by_content.setdefault(hashlib.sha256(manifest.read(sample)).digest(), []).append(sample)
            groups += [same for same in by_content.values() if len(same) > 1]
    return sorted(groups)


def _check_index(manifest: Manifest) -> Iterator[str]:
    for name, expected in manifest.file.index.items():
        with opened(manifest.folder / name) as fd:
            if sha256(fd) != expected:
                yield f"{name}: its checksum is not the manifest's"
    if manifest.labels is not None:
        known = len(manifest.classes) if manifest.classes is not None else np.inf
        if manifest.labels.min() < 0 or manifest.labels.max() >= known:
            yield f"labels run from {manifest.labels.min()} to {manifest.labels.max()}, for {known} classes"


def _check_shard(folder: Path, decode_all: bool, number: int) -> Checked:
    manifest = Manifest.load(folder, check_shards=False)
    shard, path = manifest.file.shards[number], manifest.shard_paths[number]
    first = int(manifest.counts[:number].sum())
    rows = range(first, first + shard.count)
    marks = np.zeros(shard.count, np.uint64)
    found = []
    try:
        with opened(path) as fd:
            length = os.fstat(fd).st_size
            if length != shard.bytes:
                found.append(f"{length:,} bytes, not {shard.bytes:,}")
            if shard.sha256 is not None and sha256(fd) != shard.sha256:
                found.append("its checksum is not the manifest's")
            found += _check_members(manifest, fd, path, rows)
            for row, sample in enumerate(rows):
                offset, size = int(manifest.offsets[sample]), int(manifest.sizes[sample])
                try:
                    if decode_all:
                        data = _read(fd, offset, size)
                        decode(data)
                        marks[row] = _mark(data[:EDGE], data[-EDGE:], size)
                    else:
                        edge = min(EDGE, size)
                        marks[row] = _mark(_read(fd, offset, edge), _read(fd, offset + size - edge, edge), size)
                except (OSError, BadImage) as error:
                    found.append(f"sample {sample} ({_name(manifest, sample)}): {error}")
    except (OSError, UserError) as error:
        found.append("missing" if not path.exists() else f"cannot be read: {error}")
    return Checked(shard.count, [f"{shard.name}: {line}" for line in found], marks)


def _check_members(manifest: Manifest, fd: int, path: Path, rows: range) -> list[str]:
    """The archive's own headers against index and labels."""
    options = manifest.file.options
    label = None if manifest.labels is None else options.get("label", "cls")
    try:
        there = find_samples(fd, path, options.get("image"), label)
    except UserError as error:
        return [str(error)]
    part = slice(rows.start, rows.stop)
    found = []
    if len(there.places) != len(rows):
        found.append(f"{len(there.places)} pictures, not {len(rows)}")
    elif not np.array_equal(there.places, np.stack([manifest.offsets[part], manifest.sizes[part]], axis=1)):
        found.append("the index does not fit the members")
    if there.labels is not None and not np.array_equal(there.labels, manifest.labels[part]):  # type: ignore[index]
        found.append("the labels in the shard are not those of the manifest")
    return found


def _read(fd: int, offset: int, size: int) -> bytes:
    data = os.pread(fd, size, offset)
    if len(data) != size:
        raise OSError(f"the shard ends early: {len(data):,} of {size:,} bytes at {offset:,}")
    return data


def _mark(head: bytes, tail: bytes, size: int) -> int:
    digest = hashlib.blake2b(head + tail + size.to_bytes(8, "big"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def _name(manifest: Manifest, sample: int) -> str:
    try:
        return manifest.key(sample)
    except Exception:  # the header may be what is damaged
        return "name unreadable"
