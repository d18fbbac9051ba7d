"""What will be written, known before the first byte: which samples, in which order, in which shard, at which offset.

A plan depends on the names, labels and sizes of the source pictures and on the options; not on when, where or by how
many processes it is carried out. Its hash marks every finished shard, which is what makes a killed run resumable.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mimscale.data import noise
from mimscale.data.manifest import Ints
from mimscale.errors import UserError

BLOCK = 512  # tar's unit: a header is one block, contents are padded to whole blocks, two empty blocks end the archive
END = 2 * BLOCK
KEY_BYTES = 90  # with extension it fits into the plain 100-byte name of a tar header


class Item(NamedTuple):
    """One picture of a source: `size` bytes at `offset` of file `path`; offset 0 = the whole file. label -1 = none."""

    key: str
    extension: str
    label: int
    path: str
    offset: int
    size: int


@dataclass(frozen=True)
class Source:
    """All pictures of a data set. description: what goes into the manifest. skipped: reason -> files left out."""

    description: dict[str, Any]
    items: list[Item]
    classes: list[str] | None
    skipped: Counter[str] = field(default_factory=Counter)


SIGNATURES = {  # extension -> start of the file; "." = any byte
    "jpg": (b"\xff\xd8\xff",),
    "png": (b"\x89PNG\r\n\x1a\n",),
    "webp": (b"RIFF....WEBP",),
    "gif": (b"GIF8",),
    "bmp": (b"BM",),
    "tif": (b"II*\0", b"MM\0*"),
    "ppm": (b"P2", b"P3", b"P5", b"P6"),
}
SIGNATURE_BYTES = 12
IMAGE_EXTENSIONS = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm"}


def sniff(start: bytes) -> str | None:
    """The extension that a file's first bytes call for; None if it is no picture that the loader decodes."""
    for extension, signatures in SIGNATURES.items():
        for signature in signatures:
            if len(start) >= len(signature) and all(
                a == b or b == ord(".") for a, b in zip(start, signature, strict=False)
            ):
                return extension
    return None


def unique_keys(names: Iterable[str]) -> list[str]:
    """File names without extension -> keys for WebDataset: no dots (they would begin the extension), short, unique."""
    keys: list[str] = []
    seen: set[str] = set()
    for name in names:
        key = "".join(c if c.isalnum() or c in "/-_" else "_" for c in name)
        if len(key.encode()) > KEY_BYTES - 8:  # room for what makes it unique
            head = key.encode()[: KEY_BYTES - 30].decode(errors="ignore")
            key = f"{head}-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:16]}"
        plain, number = key, 1
        while key in seen:
            number += 1
            key = f"{plain}-{number}"
        seen.add(key)
        keys.append(key)
    return keys


def padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


class Plan:
    """items: shuffled. bounds: shard s holds items[bounds[s]:bounds[s + 1]]. hash: see the module."""

    def __init__(self, source: Source, *, seed: int, shard_mb: int, shard_samples: int | None):
        if not source.items:
            raise UserError(
                f"no pictures in '{source.description['path']}' ({describe(source.skipped) or 'it is empty'})"
            )
        self.source, self.seed = source, seed
        self.options = {"seed": seed, "shard_mb": shard_mb, "shard_samples": shard_samples}
        by_key = sorted(source.items)
        total = len(by_key)
        self.items = [by_key[i] for i in noise.permutation(seed, "data_prep", n=total)]
        needed = self.bytes / (shard_mb << 20) if shard_samples is None else total / shard_samples
        shards = min(math.ceil(needed), total)
        self.bounds = [total * shard // shards for shard in range(shards + 1)]
        self.hash = self._hash()

    @property
    def shards(self) -> int:
        return len(self.bounds) - 1

    @property
    def labelled(self) -> bool:
        return self.source.classes is not None

    @property
    def bytes(self) -> int:
        """Length of all members together."""
        label = 2 * BLOCK if self.labelled else 0
        return sum(BLOCK + padded(item.size) + label for item in self.items)

    def shard(self, number: int) -> list[Item]:
        return self.items[self.bounds[number] : self.bounds[number + 1]]

    def index(self) -> Ints:
        """int64 [N, 2]: offset and size of each picture inside its shard."""
        sizes = np.array([item.size for item in self.items], dtype=np.int64)
        spans = BLOCK + -(-sizes // BLOCK) * BLOCK + (2 * BLOCK if self.labelled else 0)
        starts = np.cumsum(spans) - spans
        for first, last in zip(self.bounds, self.bounds[1:], strict=False):
            starts[first:last] -= starts[first]
        return np.stack([starts + BLOCK, sizes], axis=1)

    def labels(self) -> Ints | None:
        return np.array([item.label for item in self.items], dtype=np.int64) if self.labelled else None

    def _hash(self) -> str:
        digest = hashlib.sha256(json.dumps([1, self.options, self.bounds, self.source.classes]).encode())
        for item in self.items:
            digest.update(f"\n{item.key}.{item.extension} {item.label} {item.size}".encode())
        return digest.hexdigest()


def describe(skipped: Counter[str]) -> str:
    """'3 hidden files, 1 not a picture': what was left out, for the reader."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
