"""The plan of a conversion, made before anything is written: which images, in which order, in which shard.

A plan depends on the names, labels and sizes of the source images, on the pixels of a source that is read as a whole
(where every image has the same size, these say nothing), and on the options; not on when, where or by how many
processes it is executed. Its hash is stored with every finished shard, so that a killed run can be resumed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from data_prep.images import ImageOptions
from data_prep.labels import check_names
from data_prep.tar import BLOCK, padded_size
from mimscale.data import noise
from mimscale.data.names import utf8
from mimscale.data.sidecars import METADATA, is_sidecar
from mimscale.errors import UserError

KEY_BYTES = 90  # with its extension it fits into the 100-byte name field of a tar header


class Item(NamedTuple):
    """One image of a source: `size` bytes at `offset` of file `path`; offset 0 = the whole file. label -1 = none.

    In a parquet file `column` is the name of the column, `offset` the row and `size` an estimate. In a file of pixels
    `column` begins with `data_prep.png_rows.PREFIX`, `offset` is the row and `size` the bytes of its pixels.
    """

    key: str
    label: int
    path: str
    offset: int
    size: int
    column: str = ""


@dataclass(frozen=True)
class Source:
    """All images of a data set. description: for the manifest. skipped: reason -> number of files left out.
    left_out: name -> reason of those among them that were to be images.

    root: folder of relative paths that rows of parquet files have instead of bytes.
    runs: lengths of consecutive runs of items that should be read together (row groups of parquet); None = no runs.
    png_encoder: versions of what makes PNGs of pixels; None where the images are encoded already.
    pixels: sha256 of all images; None where something else compares them (torchvision's own checksums), or their sizes.
    """

    description: dict[str, Any]
    items: list[Item]
    classes: list[str] | None
    skipped: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, str] = field(default_factory=dict)
    runs: list[int] | None = None
    root: str = ""
    png_encoder: str | None = None
    pixels: str | None = None


def unique_keys(names: Iterable[str]) -> list[str]:
    """File names without extension -> keys for WebDataset: short, unique, no dots (the extension starts at one)."""
    keys: list[str] = []
    seen: set[str] = set()
    for name in names:
        key = "".join(c if c.isalnum() or c in "/-_" else "_" for c in name)
        if len(key.encode()) > KEY_BYTES - 8:  # 8 bytes are left for the number that makes it unique
            head = key.encode()[: KEY_BYTES - 30].decode(errors="ignore")
            key = f"{head}-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:16]}"
        if METADATA.match(key) or is_sidecar(key):  # readers pass over such names
            key = re.sub("_+", "_", key)
        plain, number = key, 1
        while key in seen:
            number += 1
            key = f"{plain}-{number}"
        seen.add(key)
        keys.append(key)
    return keys


class ShardPlan:
    """items: shuffled. bounds: shard s holds items[bounds[s]:bounds[s + 1]]. hash: see the module."""

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        shard_mb: int = 256,
        shard_samples: int | None = None,
        images: ImageOptions | None = None,
    ):
        if not source.items:
            raise UserError(
                f"no images in '{source.description['path']}' ({describe(source.skipped) or 'it is empty'})"
            )
        check_names([utf8(name) for name in source.classes or ()], f"'{source.description['path']}': ")
        self.source, self.images = source, images or ImageOptions()
        self.options = {
            "seed": seed,
            "shard_mb": shard_mb,
            "shard_samples": shard_samples,
            **self.images.options(),
            **({} if source.png_encoder is None else {"png_encoder": source.png_encoder}),
        }
        self.items = _shuffled(source, seed)
        total = len(self.items)
        wanted = self.bytes / (shard_mb << 20) if shard_samples is None else total / shard_samples
        shards = min(math.ceil(wanted), total)
        self.bounds = [total * shard // shards for shard in range(shards + 1)]
        if source.runs is not None:
            for number in range(shards):
                part = slice(self.bounds[number], self.bounds[number + 1])
                order = noise.permutation(seed, "data_prep/shard", number, n=part.stop - part.start)
                self.items[part] = [self.items[part.start + i] for i in order]
        self.hash = self._hash()

    @property
    def shards(self) -> int:
        return len(self.bounds) - 1

    @property
    def labelled(self) -> bool:
        return self.source.classes is not None

    @property
    def bytes(self) -> int:
        """Length of all members together, if the images are stored unchanged."""
        label = 2 * BLOCK if self.labelled else 0
        return sum(BLOCK + padded_size(item.size) + label for item in self.items)

    def shard(self, number: int) -> list[Item]:
        return self.items[self.bounds[number] : self.bounds[number + 1]]

    def _hash(self) -> str:
        digest = hashlib.sha256(json.dumps([2, self.options, self.bounds, self.source.classes]).encode())
        for item in self.items:
            digest.update(f"\n{item.key} {item.label} {item.size}".encode())
        if self.source.pixels is not None:
            digest.update(f"\n{self.source.pixels}".encode())
        return digest.hexdigest()


def _shuffled(source: Source, seed: int) -> list[Item]:
    """All items in random order, or, if the source has runs, the runs in random order."""
    if source.runs is None:
        by_key = sorted(source.items)
        return [by_key[i] for i in noise.permutation(seed, "data_prep", n=len(by_key))]
    ends = np.cumsum(source.runs)
    order = noise.permutation(seed, "data_prep", n=len(ends))
    return [item for run in order for item in source.items[ends[run] - source.runs[run] : ends[run]]]


def describe(skipped: Counter[str]) -> str:
    """'3 hidden, 1 without an image's content': the files that were left out, as text."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
