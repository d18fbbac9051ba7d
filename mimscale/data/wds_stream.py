"""Streams of WebDataset shards that have no index (`data.shards: wds:URLS`), read with the webdataset package.

NOT EXACT: each worker of each rank reads its own shards through a small shuffle buffer, so the images that a run sees
depend on the numbers of ranks and workers. A resumed run starts reading the shards again, in another order. In a
damaged shard everything after the damage is lost. Positions, and with them crops, flips and noise, are the same as with
an index. With an index (`python -m data_prep index`, which copies nothing) all of it is exact.

Nothing is passed to a shell and nothing is unpickled: members stay bytes, and storage.py opens the shards.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import random
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count, islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import shuffle
from webdataset.shardlists import expand_urls

from mimscale.data import noise
from mimscale.data.config import DataConfig
from mimscale.data.datasets import BatchBuilder, Empty, Load
from mimscale.data.decode import EXTENSIONS, AnyImage, BadImage, Wanted, make_decoder
from mimscale.data.manifest import MAX_REQUESTS, Ints, Manifest
from mimscale.data.mixture import Mixture
from mimscale.data.names import one_line
from mimscale.data.packed import LONGEST, compression, unpack
from mimscale.data.sample_reader import DamagedSample
from mimscale.data.shard_cache import Cache, read_exactly
from mimscale.data.sidecars import METADATA, is_sidecar
from mimscale.data.storage import storage, with_retries
from mimscale.data.tar_end import BLOCK, RestOfArchive, joined_archive
from mimscale.errors import UserError, warn
from mimscale.types import Batch, Damage, Needs

PREFIX = "wds:"
CHUNK = 4 << 20  # bytes per read of a shard
REACH = 8 << 20  # bytes of a compressed shard that are kept behind the place of reading
UNPACKERS: dict[str, Callable[[Any], Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
MAX_DAMAGED_IN_A_ROW = 1000  # samples; after more of them a reader gives up
NOT_EXACT = (
    "data is streamed without an index, which is not exact: a resume starts the shards again, and another number of "
    "ranks or workers sees other images; `python -m data_prep index` makes it exact and copies nothing"
)


class WebDatasetStream:
    """Shards without an index, with the attributes of a Manifest that the loader uses.

    samples: number of samples, from the recipe. Raises UserError for a URL that cannot be read, and if there are fewer
    shards than readers (ranks x workers).
    """

    labels = None
    cache = None

    def __init__(self, data: DataConfig, world: int = 1):
        assert data.stream is not None and isinstance(data.shards, str)
        self.location = self.folder = data.shards
        self.samples = data.stream.samples
        try:
            self.shard_paths = expand_urls(data.shards.removeprefix(PREFIX))
        except ValueError as error:
            raise UserError(f"data.shards = {self.location}: {error}; write part-{{000..127}}.tar") from None
        with ThreadPoolExecutor(MAX_REQUESTS) as pool:
            list(pool.map(_check_shard, self.shard_paths))
        shards, workers = len(self.shard_paths), max(1, data.workers)
        if shards < world * workers:
            raise UserError(
                f"{shards} shards of {self.location} are too few for {world} ranks x {workers} workers, each of which "
                f"reads its own shards; lower data.workers, or index the shards with `python -m data_prep index`"
            )

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the names of the shards, because their contents are not known."""
        names = [url.rpartition("/")[2] for url in self.shard_paths]
        return hashlib.sha256(json.dumps([PREFIX, self.samples, names]).encode()).hexdigest()

    def key(self, sample_id: int) -> str:
        """Raises OSError: samples of a stream cannot be found by their id."""
        raise OSError(f"{self.location} has no index")


Source = Manifest | Mixture | WebDatasetStream


def open_source(data: DataConfig, world: int = 1) -> Source:
    """Open `data.shards`. Raises UserError."""
    if isinstance(data.shards, dict):
        return Mixture.load(data.shards, Cache.from_config(data))
    return (
        Manifest.load(data.shards, cache=Cache.from_config(data))
        if data.stream is None
        else WebDatasetStream(data, world)
    )


def _check_shard(url: str) -> None:
    """Raises UserError if the shard cannot be opened."""
    try:
        _ShardFile(url).close()
    except OSError as error:
        raise UserError(f"shard '{url}' cannot be opened ({error}); correct data.shards") from None


class StreamDataset(IterableDataset[list[Batch]]):
    """The micro-batches of one rank as `TrainDataset` makes them, but with the images in the order of the stream.

    items: endless (image positions int64 [B], crop positions int64 [rows, B]) of the rank, see `PositionSampler`; the
    workers take them in turn. Sample ids are 63 bits of a hash of the shard's name and the sample's key. Raises
    DamagedSample if a worker finds nothing usable in its shards.
    """

    def __init__(
        self,
        source: WebDatasetStream,
        data: DataConfig,
        needs: Needs,
        seed: int,
        global_batch: int,
        items: Iterable[tuple[Ints, Ints]],
        rank: int,
        world: int,
    ):
        self.source, self.data, self.seed, self.items, self.rank, self.world = source, data, seed, items, rank, world
        self.batch_builder = BatchBuilder(source.samples, data, needs, seed, global_batch)
        self.decode = make_decoder(data)

    def use(self, memory: Empty) -> None:
        self.batch_builder.empty = memory

    def __iter__(self) -> Iterator[list[Batch]]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        items = islice(self.items, number, None, workers)
        _, positions = next(items)
        first = int(positions.min()) // self.data.crops  # keys the order, so a resumed run starts with other shards
        load = self._loader(first, self.rank * workers + number, self.world * workers)
        yield self.batch_builder(positions, load, None)
        for _, positions in items:
            yield self.batch_builder(positions, load, None)

    def _loader(self, first: int, reader: int, readers: int) -> Load:
        """Gives (id, image, damage found since the last image) of one of all readers (workers of all ranks)."""
        assert self.data.stream is not None
        damage = list[Damage]()
        encoded = self._encoded(first, reader, readers, damage)
        rng = random.Random(int(noise.raw(self.seed, "stream shuffle", first, reader, n=1)[0]))
        samples = shuffle(self.data.stream.buffer, rng=rng)(encoded)
        return lambda column, wanted: self._next(samples, wanted, damage)

    def _next(
        self, samples: Iterator[dict[str, Any]], wanted: Wanted, damage: list[Damage]
    ) -> tuple[int, AnyImage, list[Damage]]:
        """The next sample that can be used."""
        for sample in samples:
            shard, key = sample["__url__"].rpartition("/")[2], sample["__key__"]
            sample_id, key = _hashed_id(f"{shard}/{key}"), one_line(key)
            try:
                image = self.decode(next(sample[name] for name in sorted(EXTENSIONS) if name in sample), wanted)
            except (BadImage, StopIteration) as error:
                reason = (
                    str(error) or f"no image among {', '.join(_dotted(sample))}: the first dot begins the extension"
                )
                damage.append(Damage(sample_id, shard, key, reason))
                if len(damage) > MAX_DAMAGED_IN_A_ROW:
                    raise self._nothing_usable(damage) from error
                continue
            found = damage.copy()
            damage.clear()
            return sample_id, image, found
        raise AssertionError("a stream is endless")

    def _encoded(self, first: int, reader: int, readers: int, damage: list[Damage]) -> Iterator[dict[str, Any]]:
        """Endless samples with encoded images: each pass distributes all shards over the readers in a new order."""
        urls = self.source.shard_paths
        told = False
        for number in count():
            mine = noise.permutation(self.seed, "stream shards", first, number, n=len(urls))[reader::readers]
            usable = 0
            for url in (urls[i] for i in mine.tolist()):
                passed = Counter[str]()
                for sample in _read_samples(url, damage, passed):
                    usable += 1
                    yield sample
                if passed and not told:
                    what = ", ".join(f"{total:,} {reason}" for reason, total in passed.items())
                    warn(f"data: members of '{one_line(url)}' are passed over: {what}; other shards are not named")
                    told = True
            if not usable:
                raise self._nothing_usable(damage)

    def _nothing_usable(self, damage: list[Damage]) -> DamagedSample:
        last = f": {damage[-1].shard}: {damage[-1].key} ({damage[-1].reason})" if damage else ": they hold no images"
        return DamagedSample(f"nothing in the shards of {self.source.location} can be used{last}")


def _read_samples(url: str, damage: list[Damage], passed: Counter[str] | None = None) -> Iterator[dict[str, Any]]:
    """The samples of one shard, as extension -> bytes. After damage the rest of the shard is skipped and recorded.

    passed: counts what belongs to no image.
    """
    name = url.rpartition("/")[2]
    passed = Counter() if passed is None else passed

    def record(error: Exception) -> bool:
        reason = f"{type(error).__name__}: {error.args[0] if error.args else ''}"
        damage.append(Damage(_hashed_id(name), name, "", reason))
        return True

    try:
        shard = _ShardFile(url)
    except OSError as error:
        record(error)
        return
    for sample in _samples(_members(shard, url, record, passed), passed):
        if any(extension.rpartition(".")[2] in EXTENSIONS for extension in sample):  # or it is named as damage
            yield sample | {"__url__": url}
        else:
            passed["samples without an image"] += 1


def _samples(files: Iterable[tuple[str, bytes]], passed: Counter[str]) -> Iterator[dict[str, Any]]:
    """Consecutive files with the same key, as `data_prep index` has them: a second one with the same extension begins
    another sample. The extension begins at the first dot of the file's name."""
    sample: dict[str, Any] = {}
    for name, data in files:
        folder, slash, file = name.rpartition("/")
        stem, _, extension = file.partition(".")
        key, extension = folder + slash + stem, extension.lower()
        if not extension:
            passed["without an extension"] += 1
            continue
        if sample and (key != sample["__key__"] or extension in sample):
            yield sample
            sample = {}
        sample |= {extension: data, "__key__": key}
    if sample:
        yield sample


def _members(
    shard: _ShardFile, url: str, record: Callable[[Exception], bool], passed: Counter[str]
) -> Iterator[tuple[str, bytes]]:
    """The files of a shard, name and contents. Archives may be joined in one shard, and the shard may be compressed
    with gzip, bzip2 or xz."""
    start: int | None = 0
    ended = 0
    try:
        packed = compression(shard.read_at(0, min(LONGEST, shard.end)))
        if packed in UNPACKERS:
            shard = _PackedFile(shard, UNPACKERS[packed])
        elif packed is not None:
            raise OSError(f"it is compressed ({packed}), which a stream does not read; {unpack(url, packed)}")
        while start is not None:
            shard.offset = start
            stream = io.BufferedReader(shard, CHUNK)
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                places: dict[str, tuple[int, int]] = {}  # of each file, for hard links to it
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # else all headers stay in memory
                    if member.isdir():
                        continue
                    if METADATA.match(member.name) or is_sidecar(member.name):
                        passed["hidden, of the system or metadata"] += 1
                        continue
                    place = start + member.offset_data, member.size
                    if member.isreg():
                        contents = archive.extractfile(member)
                        data = b"" if contents is None else contents.read()
                    elif member.islnk() and member.linkname in places:
                        place = places[member.linkname]
                        data = shard.read_at(*place)
                    else:
                        if member.name.rpartition(".")[2].lower() in EXTENSIONS:
                            record(OSError(f"'{one_line(member.name)}' is a link or device, which is not followed"))
                        continue
                    places[member.name] = place
                    yield member.name, data
                ended = start + archive.offset  # where its end mark stands
            stream.detach()
            start = joined_archive(shard.read_at, start, ended, shard.end)
        if shard.end - ended < BLOCK:  # no end mark; tarfile does not report it
            raise OSError("it is truncated, or a header in it is damaged: what follows was left out")
    except RestOfArchive as error:  # its message gives sizes, which are not known of a compressed shard
        packed_error = OSError("a header in it is damaged: what follows was left out")
        record(packed_error if isinstance(shard, _PackedFile) else error)
    except (OSError, tarfile.TarError, ValueError, EOFError, zlib.error, lzma.LZMAError) as error:
        record(error)


def _dotted(sample: dict[str, Any]) -> list[str]:
    return [f".{one_line(name)[:20]}" for name in sample if not name.startswith("__")][:3]


def _hashed_id(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest(), "big") >> 1


class _ShardFile(io.RawIOBase):
    """A shard as a file that is read once from start to end. Raises OSError."""

    def __init__(self, url: str):
        folder, slash, self.name = url.rpartition("/")
        self.storage = storage(folder or slash or ".")
        self.offset, self.end = 0, self.storage.size(self.name)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.read_at(self.offset, min(len(buffer), self.end - self.offset))
        buffer[: len(data)] = data
        self.offset += len(data)
        return len(data)

    def read_at(self, offset: int, size: int) -> bytes:
        read = partial(self.storage.read, self.name)
        return with_retries(partial(read_exactly, read, offset, size)) if size else b""


class _PackedFile(_ShardFile):
    """The contents of a shard that is compressed, read once from start to end; `read_at` reaches back a
    little. `end` is the largest number until the end is seen. Raises OSError or EOFError for damage.
    """

    def __init__(self, packed: _ShardFile, unpack: Callable[[Any], Any]):
        self.name, self.storage = packed.name, packed.storage
        self.offset, self.end = 0, sys.maxsize
        self._contents = unpack(io.BufferedReader(packed, CHUNK))
        self._start, self._kept = 0, b""  # contents from the byte `_start` on

    def read_at(self, offset: int, size: int) -> bytes:
        if offset < self._start:
            raise OSError("a header in it is damaged: what follows was left out")
        while self._start + len(self._kept) < offset + size and self.end == sys.maxsize:
            data = self._contents.read(CHUNK)
            if not data:
                self.end = self._start + len(self._kept)
            kept = max(0, min(len(self._kept), self._start + len(self._kept) - offset + REACH))
            dropped = len(self._kept) - kept
            self._start, self._kept = self._start + dropped, self._kept[dropped:] + data
        return self._kept[offset - self._start : offset - self._start + size]
