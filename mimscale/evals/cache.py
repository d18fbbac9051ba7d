"""Features of a data set on disk, so that the next protocol reads them and a killed job goes on.

    RUN/eval/features/POOLING-KEY/       or DIR/POOLING-KEY/ with --cache DIR
      features.npy                       float32 [N, ...], all samples in the order of the data set
      about.json                         what they are of, their sha256; written last
      part-000003.safetensors            while the two are not there: one chunk of consecutive samples

KEY is the start of the sha256 of all that the numbers depend on (`Array.key`): the content of the checkpoint, the
fingerprint of the data set, crop and image size, pooling, number format of the network, and `VERSION`. Other weights
have another KEY. Files appear whole or not at all, each says the whole key and a checksum, and what does not agree is
computed again, with one line that says so.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mimscale.errors import UserError, warn
from mimscale.files.atomic import atomic_stream, atomic_write, remove_leftovers

VERSION = 1  # of the numbers: raise it with every change of code that changes them
MOST_SAMPLES, MOST_BYTES = 4096, 256 << 20  # of a chunk
LEAST_CHUNKS = 64  # so that ranks share them evenly, unless they would be of fewer than LEAST_SAMPLES
LEAST_SAMPLES = 32
READ = 16 << 20


@dataclass(frozen=True)
class Array:
    """One network's features of one data set under one pooling, float32 [samples, *shape].

    of: everything that the numbers depend on, as JSON values.
    """

    of: Mapping[str, Any]
    samples: int
    shape: tuple[int, ...]

    @property
    def key(self) -> str:
        """sha256 of `of`, of the sizes and of `VERSION`."""
        whole = {**self.of, "samples": self.samples, "shape": list(self.shape), "version": VERSION}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    @property
    def bytes(self) -> int:
        return 4 * self.samples * prod(self.shape)


def chunk_length(samples: int, shape: tuple[int, ...]) -> int:
    """Consecutive samples that are computed and written together: a power of two, the same for any number of ranks."""
    most = min(MOST_SAMPLES, max(1, MOST_BYTES // (4 * prod(shape))), max(LEAST_SAMPLES, samples // LEAST_CHUNKS))
    return 1 << (most.bit_length() - 1)


class Stored:
    """An array on disk. Chunks are numbered from 0; `length` samples each, the last may have fewer."""

    def __init__(self, array: Array, folder: Path, length: int) -> None:
        self.array, self.length = array, length
        self.folder = folder / f"{array.of['pooling']}-{array.key[:16]}"
        self.values, self.about = self.folder / "features.npy", self.folder / "about.json"

    def missing(self) -> list[int]:
        """Chunks that are to be computed; what is damaged is removed, with a line. Raises OSError."""
        if not self.folder.is_dir():
            return self._chunks()
        remove_leftovers(self.folder)
        if self.about.exists():
            why = self._fault()
            if why is None:
                for path in self.folder.glob("part-*"):  # of a job that worked beside the one that finished
                    path.unlink(missing_ok=True)
                return []
            warn(f"mimscale evaluate: {self.folder} {why}; its features are computed again")
            for path in (self.about, self.values):
                path.unlink(missing_ok=True)
        return [number for number in self._chunks() if not self._has(number)]

    def put(self, number: int, values: Tensor) -> None:
        """Write a chunk, float32 [n, ...]. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        values = values.contiguous()
        metadata = {"key": self.array.key, "sha256": hashlib.sha256(values.numpy().tobytes()).hexdigest()}
        atomic_write(self._part(number), save({"features": values}, metadata))

    def complete(self) -> None:
        """Make one file of the parts, unless it is there already or another job does it meanwhile. Raises OSError."""
        if self.about.exists():
            return
        checksum = hashlib.sha256()
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.array.samples, *self.array.shape)}
        try:
            with atomic_stream(self.values) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for number in self._chunks():
                    data = _read_part(self._part(number))[0].numpy().tobytes()
                    checksum.update(data)
                    file.write(data)
        except FileNotFoundError:
            if self.about.exists():
                return
            raise
        about = {"key": self.array.key, "of": dict(self.array.of), "sha256": checksum.hexdigest()}
        atomic_write(self.about, (json.dumps(about, indent=1) + "\n").encode())
        for number in self._chunks():
            self._part(number).unlink(missing_ok=True)

    def open(self) -> Tensor:
        """The whole array, mapped: pages come from the disk when they are read, and are shared by the ranks of a node.

        A change in place stays in this process. Raises UserError where this node does not see the file.
        """
        try:
            return torch.from_numpy(np.load(self.values, mmap_mode="c"))
        except FileNotFoundError:
            raise UserError(
                f"{self.values} was written by another rank and is not there on this node; name a folder that all "
                f"nodes share with --cache, or pass --no-cache"
            ) from None

    def _chunks(self) -> list[int]:
        return list(range(-(-self.array.samples // self.length)))

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.safetensors"

    def _has(self, number: int) -> bool:
        path = self._part(number)
        if not path.is_file():
            return False
        try:
            values, metadata = _read_part(path)
            if metadata.get("key") != self.array.key:
                why = "is of other weights or data"
            elif metadata.get("sha256") != hashlib.sha256(values.numpy().tobytes()).hexdigest():
                why = "is damaged: its checksum is another"
            elif len(values) != min(self.length, self.array.samples - number * self.length):
                why = f"has {len(values)} samples"
            else:
                return True
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            why = f"is damaged ({error})"
        warn(f"mimscale evaluate: {path} {why}; it is computed again")
        path.unlink(missing_ok=True)
        return False

    def _fault(self) -> str | None:
        """What is wrong with the complete array."""
        if not (self.about.is_file() and self.values.is_file()):
            return "is damaged: not two regular files"
        try:
            about = json.loads(self.about.read_bytes())
            key, wanted = about["key"], about["sha256"]
            if key != self.array.key:
                return "is of other weights or data"
            values = np.load(self.values, mmap_mode="r")
        except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError) as error:
            return f"is damaged ({error})"
        if values.shape != (self.array.samples, *self.array.shape) or values.dtype != np.float32:
            return f"is damaged: {values.dtype} {list(values.shape)}"
        checksum = hashlib.sha256()
        for piece in _pieces(self.values, self.values.stat().st_size - values.nbytes):
            checksum.update(piece)
        return None if checksum.hexdigest() == wanted else "is damaged: its checksum is another"


def check_room(folder: Path, needed: int) -> None:
    """Raises UserError where the disk of `folder` has not `needed` bytes left."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    with suppress(OSError):
        free = shutil.disk_usage(place).free
        if free < needed:
            raise UserError(
                f"the features need {size_text(needed)} in {folder}, where {size_text(free)} are free; name another "
                f"folder with --cache, or pass --no-cache to keep them in memory"
            )


def size_text(count: int) -> str:
    """Bytes for a person: 3.9 GB."""
    size, unit = float(count), "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


def _read_part(path: Path) -> tuple[Tensor, Mapping[str, str]]:
    if not path.exists():
        raise FileNotFoundError(path)
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("features"), file.metadata() or {}


def _pieces(path: Path, start: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while piece := file.read(READ):
            yield piece
