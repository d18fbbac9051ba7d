"""A data set on disk: tar shards in the WebDataset layout, and an index to read any sample by its id.

    FOLDER/
      manifest.json      described below; written last, so its presence means that the data set is complete
      index.npy          int64 [samples, 2]: offset and size in bytes of each image inside its shard
      labels.npy         int64 [samples]; only if the samples are labelled
      shard-000000.tar   per sample KEY.jpg (or .png, ...) and, if labelled, KEY.cls (decimal text)

manifest.json: {"format": 1, "samples": N, "labelled": bool, "classes": [names in label order] or null, "seed": of the
shuffle, "options": {...}, "source": {...}, "shards": [{"name", "count", "bytes", "sha256"}], "index": {file: sha256},
"changed": {how: images}, "skipped": {reason: number of files or images of the source that are not in the set},
"left_out": {key: reason} of the first of them, "bad_shards": {name: reason} of shards that were left out, "location":
URL of the shards if they are not in FOLDER, else null}. sha256 is null for shards that were indexed without being read.

Sample ids are 0 .. N-1 in the order of the shards and, inside a shard, of its members. Any WebDataset reader can read
the shards; nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mimscale.data.names import Options, Text
from mimscale.data.shard_cache import CHUNK, Cache
from mimscale.data.shard_files import ShardFiles, cache_key
from mimscale.data.storage import Storage, is_remote, refuse_secrets, storage, with_retries
from mimscale.data.tar_end import BLOCK, is_header, number
from mimscale.errors import UserError
from mimscale.files.atomic import atomic_write

MANIFEST, INDEX, LABELS = "manifest.json", "index.npy", "labels.npy"
MAX_REQUESTS = 16  # concurrent requests to a remote store
LISTED, MAX_REASONS = 1000, 50  # of what was left out: keys, and different reasons
Ints = NDArray[np.int64]
Sha256 = Field(pattern="^[0-9a-f]{64}$")


class Shard(BaseModel):
    """One tar file: number of samples, length in bytes, checksum."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.tar$")
    count: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str | None = Sha256


class ManifestFile(BaseModel):
    """manifest.json, typed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    samples: int = Field(ge=1)
    labelled: bool
    classes: list[Text] | None
    seed: int
    options: Options
    source: Options
    shards: list[Shard] = Field(min_length=1)
    index: dict[Literal["index.npy", "labels.npy"], str]
    left_out: dict[Text, Text] = Field(default_factory=dict)
    changed: dict[str, int] = Field(default_factory=dict)
    skipped: dict[Text, int] = Field(default_factory=dict)
    bad_shards: dict[Text, Text] = Field(default_factory=dict)
    location: str | None = Field(None, pattern="^[a-z0-9]+://")


class Manifest:
    """An opened data set. Index and labels are memory-mapped: all processes of a node share one copy of them.

    samples: N. counts: int64 [shards]. shard_paths: [shards]. offsets, sizes: int64 [N]. labels: int64 [N] or None.
    classes: names in label order or None. fingerprint: sha256 of content and order, independent of the location.
    location: the folder or URL that holds the shards. folder: the local folder that holds index and labels.
    """

    def __init__(
        self,
        folder: Path,
        file: ManifestFile,
        index: Ints,
        labels: Ints | None,
        location: str | None = None,
        cache: Cache | None = None,
    ):
        self.folder, self.file, self.index, self.labels = folder, file, index, labels
        self.location, self.cache = location or str(folder), cache
        self.samples, self.classes = file.samples, file.classes
        self.offsets, self.sizes = index[:, 0], index[:, 1]
        self.shard_paths = [folder / shard.name for shard in file.shards]
        self.counts: Ints = np.array([shard.count for shard in file.shards], dtype=np.int64)
        self._ends: Ints = np.cumsum(self.counts)
        self._starts: Ints = self._ends - self.counts
        self._last = self._ends.tolist()  # bisecting a list is faster for a single sample
        names = [shard.name for shard in file.shards]
        keys = [cache_key(shard.sha256, self.location, shard.name, shard.bytes) for shard in file.shards]
        self._files = ShardFiles(self.location, names, keys, cache)

    @classmethod
    def load(cls, folder: str | Path, check_shards: bool = True, cache: Cache | None = None) -> Manifest:
        """Open the data set in `folder` (or the path of its manifest.json). Raises UserError for all that is wrong.

        check_shards: every shard must exist with its length, and index and labels must have their checksums (checked by
        local rank 0 of each node); the contents of shards are checked by `data_prep verify`.
        folder: a path or a URL (see storage.py). For a URL a cache is required, into which index and labels are copied.
        """
        location = str(folder).removesuffix(f"/{MANIFEST}")
        if location.startswith("wds:"):
            raise UserError(f"'{location}' is a stream, for training only; index it with `python -m data_prep index`")
        if is_remote(location):
            refuse_secrets(location)
        folder = _download_index(location, cache) if is_remote(location) else Path(location)
        if not folder.is_dir():
            raise UserError(f"data set '{folder}': no such folder; make it with `python -m data_prep`")
        if (folder / MANIFEST).exists() and not (folder / MANIFEST).is_file():  # reading a pipe would never end
            raise UserError(f"'{folder / MANIFEST}' is not a regular file; repeat its `python -m data_prep`")
        try:
            file = ManifestFile.model_validate_json((folder / MANIFEST).read_bytes())
        except FileNotFoundError:
            raise UserError(_no_manifest(folder)) from None
        except (ValidationError, OSError) as error:
            reason = str(error.errors()[0]["msg"]) if isinstance(error, ValidationError) else str(error.strerror)
            raise UserError(f"'{folder / MANIFEST}' is damaged ({reason}); repeat its `python -m data_prep`") from None
        if sum(shard.count for shard in file.shards) != file.samples or file.labelled != (LABELS in file.index):
            raise UserError(f"'{folder / MANIFEST}' contradicts itself; repeat its `python -m data_prep`")
        index = _open_mapped(folder / INDEX, (file.samples, 2))
        labels = _open_mapped(folder / LABELS, (file.samples,)) if file.labelled else None
        location = file.location or location
        manifest = cls(folder, file, index, labels, location, cache)
        if check_shards:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                _check_index(folder, file.index)
            _check_shards(location, file.shards)
        return manifest

    def __reduce__(self) -> tuple[object, ...]:  # a spawned process maps the files again
        return _unpickle, (self.folder, self.location, self.cache)

    def cut_file(self) -> Path | None:
        """The first of the mapped files that is shorter now than when it was opened: reading it ends a process."""
        for name, array in ((INDEX, self.index), (LABELS, self.labels)):
            path = self.folder / name
            if array is not None and (not path.is_file() or path.stat().st_size < array.nbytes):
                return path
        return None

    @property
    def shards(self) -> list[Shard]:
        return self.file.shards

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over shard contents, sample order, labels and class names."""
        shards = [(shard.count, shard.bytes, shard.sha256) for shard in self.file.shards]
        values = [self.file.format, self.samples, self.classes, shards, sorted(self.file.index.items())]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    def locate(self, ids: ArrayLike) -> tuple[Ints, Ints]:
        """int64 [n] sample ids -> (shard numbers, rows inside the shards). Raises IndexError."""
        at = np.asarray(ids, dtype=np.int64)
        if at.size and (at.min() < 0 or at.max() >= self.samples):
            raise IndexError(f"sample id outside 0 .. {self.samples - 1}")
        shards = np.searchsorted(self._ends, at, side="right")
        return shards, at - self._starts[shards]

    def shard_of(self, sample_id: int) -> int:
        """The shard number of one sample; `locate` is the vectorised version. Raises IndexError."""
        if not 0 <= sample_id < self.samples:
            raise IndexError(f"sample id {sample_id} outside 0 .. {self.samples - 1}")
        return bisect_right(self._last, sample_id)

    def read(self, sample_id: int) -> bytes:
        """The encoded bytes of an image. Raises OSError, also if the shard is not the one that was indexed."""
        return self._read_member(sample_id)[BLOCK:]

    def key(self, sample_id: int) -> str:
        """Name of the sample inside its shard, without extension. Raises OSError."""
        return os.path.splitext(_header(self._read_member(sample_id)).name)[0]

    def keys(self) -> list[str]:
        """The keys of all samples, in order: reads only their tar headers, by several threads. Raises OSError."""

        def name(sample_id: int) -> str:
            shard, offset, _ = self._place(sample_id)
            header = self._files.read(shard, BLOCK, offset - BLOCK)
            return os.path.splitext(_header(header).name)[0]

        with ThreadPoolExecutor(MAX_REQUESTS) as pool:
            return list(pool.map(name, range(self.samples), chunksize=1024))

    def read_ahead(self, ids: Ints) -> None:
        """Ask the system to read these samples in the background. Errors are raised by `read`, not here."""
        if is_remote(self.location) and self.cache is None:
            return
        for sample_id in ids.tolist():
            with suppress(OSError):
                shard, offset, size = self._place(sample_id)
                self._files.will_need(shard, size + BLOCK, offset - BLOCK)

    def shard_key(self, shard: int) -> str:
        """The key of a shard in a cache."""
        return self._files.keys[shard]

    def fetch(self, shard: int) -> bool:
        """Copy a shard into the cache, see `Cache.fetch`."""
        entry, files = self.file.shards[shard], self._files
        assert self.cache is not None
        origin = storage(self.location)
        read = partial(origin.read, entry.name)
        return self.cache.fetch(files.keys[shard], entry.bytes, entry.sha256, read)

    def reopen(self, sample_id: int) -> None:
        """After a failed read: drop the cached copy of its shard, so that the next read opens the original again."""
        self._files.reopen(self.shard_of(sample_id))

    def close(self) -> None:
        """Close all open shards; the next read opens them again."""
        self._files.close()

    def _place(self, sample_id: int) -> tuple[int, int, int]:
        """Shard number, offset and size of a sample's image. Raises OSError for numbers that its shard cannot have."""
        shard = self.shard_of(sample_id)
        offset, size = self.index[sample_id].tolist()
        entry = self.file.shards[shard]
        if offset < BLOCK or size < 0 or offset + size > entry.bytes:
            place = f"{size} bytes at {offset} of {entry.bytes}"
            raise OSError(f"'{self.location}/{entry.name}': the index is damaged: {place}")
        return shard, offset, size

    def _read_member(self, sample_id: int) -> bytes:
        """Tar header and contents of a sample's image. The header must agree with the index. Raises OSError."""
        shard, offset, size = self._place(sample_id)
        path = f"{self.location}/{self.file.shards[shard].name}"
        data = self._files.read(shard, size + BLOCK, offset - BLOCK)
        if len(data) != size + BLOCK:
            raise OSError(f"'{path}' ends early: {len(data) - BLOCK} of {size} bytes at {offset}")
        if not is_header(data[:BLOCK]):
            raise OSError(f"'{path}' has no file at {offset}, or its header is damaged")
        if (found := number(data[124:136])) != size:
            raise OSError(f"'{path}' is another shard: {found} bytes at {offset}, not {size}")
        return data


def _no_manifest(folder: Path) -> str:
    """What to do with a folder that is no data set yet."""
    shards = sum(path.suffix == ".tar" for path in folder.iterdir())
    if shards and not (folder / "plan.json").exists():  # of data_prep
        return f"'{folder}' holds {shards:,} shards without an index; make it with `python -m data_prep index {folder}`"
    return f"data set '{folder}' has no {MANIFEST}; finish or repeat its `python -m data_prep`"


def _header(member: bytes) -> tarfile.TarInfo:
    return tarfile.TarInfo.frombuf(member[:BLOCK], "utf-8", "surrogateescape")


def _unpickle(folder: Path, location: str, cache: Cache | None) -> Manifest:
    local = Manifest.load(folder, check_shards=False)
    return Manifest(folder, local.file, local.index, local.labels, location, cache)


def _check_index(folder: Path, checksums: Mapping[Any, str]) -> None:
    """Raises UserError."""
    for name, checksum in checksums.items():
        if not (folder / name).is_file():
            raise UserError(f"'{folder / name}' is missing; copy it again, or repeat its `python -m data_prep`")
        with (folder / name).open("rb") as file:
            found = hashlib.sha256()
            while chunk := file.read(CHUNK):
                found.update(chunk)
        if found.hexdigest() != checksum:
            raise UserError(
                f"'{folder / name}' has the sha256 {found.hexdigest()[:12]}, not {checksum[:12]} as {MANIFEST} says; "
                f"copy it again, or repeat its `python -m data_prep`"
            )


def shard_faults(location: str, shards: Sequence[Shard]) -> dict[str, str]:
    """Name -> fault of the shards that do not exist with their length. Raises UserError for a location of no kind."""
    origin = storage(location)

    def fault(shard: Shard) -> str | None:
        try:
            found = with_retries(partial(origin.size, shard.name))
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be reached: {error}"
        return None if found == shard.bytes else f"has {found} bytes, not {shard.bytes}"

    with ThreadPoolExecutor(MAX_REQUESTS if is_remote(location) else 1) as pool:
        found = zip(shards, pool.map(fault, shards), strict=True)
        return {shard.name: state for shard, state in found if state is not None}


def _check_shards(location: str, shards: Sequence[Shard]) -> None:
    """Every shard exists with its length. Raises UserError."""
    faults = shard_faults(location, shards)
    if faults:
        name, state = next(iter(faults.items()))
        others = f" (one of {len(faults):,} of {len(shards):,} shards)" if len(faults) > 1 else ""
        raise UserError(f"shard '{location}/{name}' {state}{others}; repeat its `python -m data_prep` or copy it again")


def _download_index(location: str, cache: Cache | None) -> Path:
    """Copy manifest, index and labels of a remote data set into the cache and check them. Returns their folder."""
    origin = storage(location)
    if cache is None:
        raise UserError(f"data set '{location}' is remote: set data.cache to a folder on the node's own disk")
    try:
        data = _download(origin, MANIFEST)
        names = json.loads(data)["index"]
        folder = cache.folder / "indices" / hashlib.sha256(data).hexdigest()
        folder.mkdir(parents=True, exist_ok=True)
        for name in (INDEX, LABELS):
            if name in names and not (folder / name).exists():
                content = _download(origin, name)
                if hashlib.sha256(content).hexdigest() != names[name]:
                    raise OSError(f"the checksum of {name} is not the manifest's")
                atomic_write(folder / name, content)
        atomic_write(folder / MANIFEST, data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"data set '{location}' cannot be opened: {error}; check that it is complete and that you may read it"
        ) from None
    return folder


def _download(origin: Storage, name: str) -> bytes:
    return with_retries(lambda: origin.read(name, 0, origin.size(name)))


def _open_mapped(path: Path, shape: tuple[int, ...]) -> Ints:
    try:
        if not path.is_file():  # opening a pipe would never end
            raise FileNotFoundError(path)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception:  # numpy parses the header as Python does, and raises whatever that does
        raise UserError(f"'{path}' is missing or damaged; repeat its `python -m data_prep`") from None
    if array.shape != shape or array.dtype != np.int64:
        raise UserError(
            f"'{path}' holds {array.dtype} {array.shape}, not int64 {shape}; repeat its `python -m data_prep`"
        )
    return array.view(np.ndarray)  # indexing a plain array is faster than indexing a memmap


def save_manifest(
    folder: Path,
    *,
    shards: Sequence[Shard],
    index: Ints,
    labels: Ints | None,
    classes: list[str] | None,
    seed: int,
    options: Mapping[str, Any],
    source: Mapping[str, Any],
    left_out: Mapping[str, str] | None = None,
    changed: Mapping[str, int] | None = None,
    skipped: Mapping[str, int] | None = None,
    skipped_names: Mapping[str, str] | None = None,
    bad_shards: Mapping[str, str] | None = None,
    location: str | None = None,
) -> None:
    """Write index, labels and, last, manifest.json. The same arguments give the same bytes.

    left_out: all of them; they are counted by reason, and the first LISTED are stored. skipped: others, as counts;
    skipped_names: name -> reason of some of these.
    """
    counts = Counter(skipped or {})
    counts.update(_by_reason((left_out or {}).values()))
    checksums = {}
    for name, array in ((INDEX, index), (LABELS, labels)):
        if array is not None:
            data = _npy(array)
            checksums[name] = hashlib.sha256(data).hexdigest()
            atomic_write(folder / name, data)
    file = ManifestFile(
        samples=len(index),
        labelled=labels is not None,
        classes=classes,
        seed=seed,
        options=dict(options),
        source=dict(source),
        shards=list(shards),
        index=checksums,
        left_out=dict(islice({**(skipped_names or {}), **(left_out or {})}.items(), LISTED)),
        changed=dict(changed or {}),
        skipped=dict(sorted(counts.items())),
        bad_shards=dict(bad_shards or {}),
        location=location,
    )
    atomic_write(folder / MANIFEST, (file.model_dump_json(indent=1) + "\n").encode())


def _by_reason(reasons: Iterable[str]) -> Counter[str]:
    """Reasons that differ in numbers only are one; beyond the MAX_REASONS most frequent, the others are one. The fix,
    behind a semicolon, is the same for all.
    """
    counts = Counter[str]()
    for reason in reasons:
        what, mark, fix = reason.partition("; ")
        counts[re.sub(r"[0-9][0-9,.]*", "N", what) + mark + fix] += 1
    kept = Counter(dict(counts.most_common(MAX_REASONS)))
    others = counts.total() - kept.total()
    return kept + Counter({"others": others})


def _npy(array: Ints) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array, dtype=np.int64), allow_pickle=False)
    return buffer.getvalue()
