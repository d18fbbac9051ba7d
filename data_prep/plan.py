"""What will be written, known before the first byte: which pictures, in which order, in which shard.

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

from data_prep.pictures import Pictures
from data_prep.tar import BLOCK, padded
from mimscale.data import noise
from mimscale.errors import UserError

KEY_BYTES = 90  # with extension it fits into the plain 100-byte name of a tar header


class Item(NamedTuple):
    """One picture of a source: `size` bytes at `offset` of file `path`; offset 0 = the whole file. label -1 = none.

    In a parquet file `path` is FILE::COLUMN, `offset` the row and `size` an estimate.
    """

    key: str
    label: int
    path: str
    offset: int
    size: int


@dataclass(frozen=True)
class Source:
    """All pictures of a data set. description: what goes into the manifest. skipped: reason -> files left out.

    runs: lengths of the runs of items that are best read together (parquet's row groups), None = any order is as good.
    """

    description: dict[str, Any]
    items: list[Item]
    classes: list[str] | None
    skipped: Counter[str] = field(default_factory=Counter)
    runs: list[int] | None = None


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


class Plan:
    """items: shuffled. bounds: shard s holds items[bounds[s]:bounds[s + 1]]. hash: see the module."""

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        shard_mb: int = 256,
        shard_samples: int | None = None,
        pictures: Pictures | None = None,
    ):
        if not source.items:
            raise UserError(
                f"no pictures in '{source.description['path']}' ({describe(source.skipped) or 'it is empty'})"
            )
        self.source, self.pictures = source, pictures or Pictures()
        self.options = {
            "seed": seed,
            "shard_mb": shard_mb,
            "shard_samples": shard_samples,
            **self.pictures.options(),
        }
        self.items = _shuffled(source, seed)
        total = len(self.items)
        needed = self.bytes / (shard_mb << 20) if shard_samples is None else total / shard_samples
        shards = min(math.ceil(needed), total)
        self.bounds = [total * shard // shards for shard in range(shards + 1)]
        if source.runs is not None:
            for number in range(shards):
                part = slice(self.bounds[number], self.bounds[number + 1])
                mixed = noise.permutation(seed, "data_prep/shard", number, n=part.stop - part.start)
                self.items[part] = [self.items[part.start + i] for i in mixed]
        self.hash = self._hash()

    @property
    def shards(self) -> int:
        return len(self.bounds) - 1

    @property
    def labelled(self) -> bool:
        return self.source.classes is not None

    @property
    def bytes(self) -> int:
        """Length of all members together, if the pictures are stored as they are."""
        label = 2 * BLOCK if self.labelled else 0
        return sum(BLOCK + padded(item.size) + label for item in self.items)

    def shard(self, number: int) -> list[Item]:
        return self.items[self.bounds[number] : self.bounds[number + 1]]

    def _hash(self) -> str:
        digest = hashlib.sha256(json.dumps([2, self.options, self.bounds, self.source.classes]).encode())
        for item in self.items:
            digest.update(f"\n{item.key} {item.label} {item.size}".encode())
        return digest.hexdigest()


def _shuffled(source: Source, seed: int) -> list[Item]:
    """All items in random order, or, where they lie in runs, the runs in random order."""
    if source.runs is None:
        by_key = sorted(source.items)
        return [by_key[i] for i in noise.permutation(seed, "data_prep", n=len(by_key))]
    ends = np.cumsum(source.runs)
    order = noise.permutation(seed, "data_prep", n=len(ends))
    return [item for run in order for item in source.items[ends[run] - source.runs[run] : ends[run]]]


def describe(skipped: Counter[str]) -> str:
    """'3 hidden files, 1 not a picture': what was left out, for the reader."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
