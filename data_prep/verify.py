"""Checks a finished data set against its manifest: lengths, checksums, offset and label of every member, the images."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.index import class_indices, sha256
from data_prep.scan_shard import scan_shard
from data_prep.shard_list import ShardList
from data_prep.tar import File, open_for_reading, read_at, size_of
from mimscale.data.decode import BadImage, decode
from mimscale.data.manifest import Manifest
from mimscale.errors import UserError

EDGE = 4096  # bytes at both ends of an image that are compared first to find duplicates


class Checked(NamedTuple):
    """samples: number of them. damage: one line per fault. hashes: uint64 [samples], equal for equal images."""

    samples: int
    damage: list[str]
    hashes: NDArray[np.uint64]


def verify(folder: Path, *, decode_all: bool, jobs: int = 1) -> Iterator[Checked]:
    """Results of the index files, then of each shard. Raises UserError if there is no readable manifest."""
    manifest = Manifest.load(folder, check_shards=False)
    yield Checked(0, list(_check_index(manifest)), np.empty(0, np.uint64))
    check = partial(_check_shard, manifest.folder, decode_all)
    numbers = range(len(manifest.counts))
    if jobs == 1:
        yield from map(check, numbers)
    else:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield from pool.map(check, numbers)


def duplicates(manifest: Manifest, hashes: NDArray[np.uint64]) -> list[list[int]]:
    """Groups of samples with the same bytes. hashes: uint64 [N] from `verify`; equal ones are compared by content.

    Raises OSError.
    """
    order = np.argsort(hashes, kind="stable")
    boundaries = np.flatnonzero(np.diff(hashes[order])) + 1
    groups = []
    for candidates in np.split(order, boundaries):
        if len(candidates) > 1:
            by_content: dict[bytes, list[int]] = {}
            for sample in candidates.tolist():
                by_content.setdefault(hashlib.sha256(manifest.read(sample)).digest(), []).append(sample)
            groups += [same for same in by_content.values() if len(same) > 1]
    return sorted(groups)


def _check_index(manifest: Manifest) -> Iterator[str]:
    for name, expected in manifest.file.index.items():
        with open_for_reading(manifest.folder / name) as fd:
            if sha256(fd) != expected:
                yield f"{name}: its checksum differs from the manifest"
    if manifest.labels is not None:
        known = len(manifest.classes) if manifest.classes is not None else np.inf
        if manifest.labels.min() < 0 or manifest.labels.max() >= known:
            yield f"labels run from {manifest.labels.min()} to {manifest.labels.max()}, for {known} classes"


def _check_shard(folder: Path, decode_all: bool, number: int) -> Checked:
    manifest = Manifest.load(folder, check_shards=False)
    shard, path = manifest.file.shards[number], manifest.shard_paths[number]
    shards = ShardList(manifest.location, [shard.name])
    first = int(manifest.counts[:number].sum())
    rows = range(first, first + shard.count)
    hashes = np.zeros(shard.count, np.uint64)
    found = []
    try:
        with shards.open(shard.name) as fd:
            length = size_of(fd)
            if length != shard.bytes:
                found.append(f"{length:,} bytes, not {shard.bytes:,}")
            if shard.sha256 is not None and sha256(fd) != shard.sha256:
                found.append("its checksum differs from the manifest")
            found += check_members(manifest, fd, path, rows)
            for row, sample in enumerate(rows):
                offset, size = int(manifest.offsets[sample]), int(manifest.sizes[sample])
                try:
                    if decode_all:
                        data = _read(fd, offset, size)
                        decode(data)
                        hashes[row] = _edge_hash(data[:EDGE], data[-EDGE:], size)
                    else:
                        edge = min(EDGE, size)
                        hashes[row] = _edge_hash(_read(fd, offset, edge), _read(fd, offset + size - edge, edge), size)
                except (OSError, BadImage) as error:
                    found.append(f"sample {sample} ({_name(manifest, sample)}): {error}")
    except (OSError, UserError) as error:
        local = manifest.file.location is None
        found.append("missing" if local and not path.exists() else f"cannot be read: {error}")
    return Checked(shard.count, [f"{shard.name}: {line}" for line in found], hashes)


def check_members(manifest: Manifest, fd: File, path: Path | str, rows: range) -> list[str]:
    """Compare the tar headers of the shard with index and labels: one line per fault. rows: its sample ids."""
    options = manifest.file.options
    odd = [name for name in ("image", "label") if not isinstance(options.get(name), str | None)]
    if odd:
        return [f"manifest.json: options.{odd[0]} = {options[odd[0]]!r:.40} is no text"]
    label = None if manifest.labels is None else options.get("label", "cls")
    try:
        contents = scan_shard(fd, path, options.get("image"), label, manifest.classes or ())
        labels = None
        if label is not None and contents.labels is not None:
            contents = contents.without_unlabelled() if options.get("skip_unlabelled") else contents
            known = [value for value in contents.labels or () if value is not None]
            labels, _ = class_indices(known, manifest.classes)
    except UserError as error:
        return [str(error)]
    part = slice(rows.start, rows.stop)
    found = []
    if len(contents.spans) != len(rows):
        found.append(f"{len(contents.spans)} images, not {len(rows)}")
    elif not np.array_equal(contents.spans, np.stack([manifest.offsets[part], manifest.sizes[part]], axis=1)):
        found.append("the index does not match the members")
    if manifest.labels is not None and not np.array_equal([] if labels is None else labels, manifest.labels[part]):
        found.append("the labels in the shard differ from the manifest")
    return found


def _read(fd: File, offset: int, size: int) -> bytes:
    inside = offset >= 0 and size >= 0 and offset + size <= size_of(fd)  # a damaged index may ask for anything
    data = read_at(fd, size, offset) if inside else b""
    if len(data) != size:
        raise OSError(f"the shard ends early: {len(data):,} of {size:,} bytes at {offset:,}")
    return data


def _edge_hash(head: bytes, tail: bytes, size: int) -> int:
    digest = hashlib.blake2b(head + tail + size.to_bytes(8, "big"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def _name(manifest: Manifest, sample: int) -> str:
    try:
        return manifest.key(sample)
    except Exception:  # the header itself may be damaged
        return "name unreadable"
