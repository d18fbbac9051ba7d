"""Streams of WebDataset shards that have no index (`data.shards: wds:URLS`), read with the webdataset package.

NOT EXACT: each process and worker walks through its own shards, shuffled in a small buffer, so which pictures a run
sees depends on the numbers of both; a resumed run starts its shards anew, in another order; what stands behind damage
in a shard is missed. Positions, and with them crops, flips and noise, are those of any run. With an index (`python -m
data_prep index`, which copies nothing) all of it is exact.

Nothing is handed to a shell and nothing is unpickled: members stay bytes, shards are opened by storage.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count, islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import shuffle
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys, tar_file_expander

from mimscale.data import noise
from mimscale.data.config import DataConfig
from mimscale.data.decode import EXTENSIONS, AnyPicture, BadImage, decoder
from mimscale.data.manifest import BLOCK, LOOKS, Ints, Manifest
from mimscale.data.sample_reader import DamagedSample
from mimscale.data.samples import Crops
from mimscale.data.shard_cache import Cache, whole
from mimscale.data.storage import patiently, storage
from mimscale.errors import UserError
from mimscale.types import Batch, Damage, Needs

PREFIX = "wds:"
CHUNK = 4 << 20  # bytes of a shard that are asked for at a time
HOPELESS = 1000  # samples in a row that cannot be used
NOTE = (
    "data is streamed without an index, which is not exact: a resume starts the shards anew, and another number of "
    "ranks or workers sees other pictures; `python -m data_prep index` makes it exact and copies nothing"
)


class WebDatasetStream:
    """Shards without an index. samples: what the recipe says of their number; the rest is there for a Manifest's users.

    Raises UserError for an address that cannot be read, and for fewer shards than there are readers.
    """

    labels = None
    cache = None

    def __init__(self, data: DataConfig, world: int = 1):
        assert data.stream is not None
        self.place = self.folder = data.shards
        self.samples = data.stream.samples
        try:
            self.shard_paths = expand_urls(data.shards.removeprefix(PREFIX))
        except ValueError as error:
            raise UserError(f"data.shards = {self.place}: {error}; write part-{{000..127}}.tar") from None
        with ThreadPoolExecutor(LOOKS) as pool:
            list(pool.map(_look, self.shard_paths))
        shards, workers = len(self.shard_paths), max(1, data.workers)
        if shards < world * workers:
            raise UserError(
                f"{shards} shards of {self.place} are too few for {world} ranks x {workers} workers that each stream "
                f"their own; lower data.workers, or index the shards with `python -m data_prep index`"
            )

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the names of the shards: contents are not known."""
        names = [url.rpartition("/")[2] for url in self.shard_paths]
        return hashlib.sha256(json.dumps([PREFIX, self.samples, names]).encode()).hexdigest()

    def key(self, sample_id: int) -> str:
        """Raises OSError: a sample of a stream cannot be asked for."""
        raise OSError(f"{self.place} has no index")


Source = Manifest | WebDatasetStream


def open_source(data: DataConfig, world: int = 1) -> Source:
    """What `data.shards` names. Raises UserError."""
    return Manifest.load(data.shards, cache=Cache.of(data)) if data.stream is None else WebDatasetStream(data, world)


def _look(url: str) -> None:
    if url.startswith("pipe:"):
        raise UserError(
            f"data.shards = {PREFIX}{url}: no shell is run for data; give a path, http(s), s3 or gs address"
        )
    try:
        _Shard(url).close()
    except OSError as error:
        raise UserError(f"shard '{url}' cannot be opened ({error}); correct data.shards") from None


class StreamSamples(IterableDataset[list[Batch]]):
    """The micro-batches of one rank as `TrainSamples` makes them, with pictures as they come.

    items: (places in the order, positions [rows, B]), endless; the workers take turns. Sample ids are 63 bits of a hash
    of the shard's name and the sample's key. Raises DamagedSample where a worker's shards hold nothing of use.
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
        self.crops = Crops(source.samples, data, needs, seed, global_batch)
        self.decode = decoder(data.decoder, data.decode_short_side)

    def __iter__(self) -> Iterator[list[Batch]]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        items = islice(self.items, number, None, workers)
        at, positions = next(items)
        first = int(positions.min()) // self.data.crops  # where a run goes on, its stream begins elsewhere
        pictures = self._pictures(first, self.rank * workers + number, self.world * workers)
        yield self.crops(positions, pictures, None)
        for _, positions in items:
            yield self.crops(positions, pictures, None)

    def _pictures(self, first: int, part: int, parts: int) -> Iterator[tuple[int, AnyPicture, list[Damage]]]:
        """(id, picture, damage met since the last one), endless."""
        assert self.data.stream is not None
        found = list[Damage]()
        samples = self._stored(first, part, parts, found)
        order = random.Random(int(noise.raw(self.seed, "stream shuffle", first, part, n=1)[0]))
        for sample in shuffle(self.data.stream.buffer, rng=order)(samples):
            shard, key = sample["__url__"].rpartition("/")[2], sample["__key__"]
            number = _number(f"{shard}/{key}")
            try:
                picture = self.decode(next(sample[name] for name in sorted(EXTENSIONS) if name in sample))
            except (BadImage, StopIteration) as error:
                found.append(Damage(number, shard, key, str(error) or "no picture in it"))
                if len(found) > HOPELESS:
                    raise self._hopeless(found) from error
                continue
            yield number, picture, found.copy()
            found.clear()

    def _stored(self, first: int, part: int, parts: int, found: list[Damage]) -> Iterator[dict[str, Any]]:
        """Undecoded samples, endless: each turn deals all shards out anew."""
        urls = self.source.shard_paths
        for turn in count():
            mine = noise.permutation(self.seed, "stream shards", first, turn, n=len(urls))[part::parts]
            usable = 0
            for url in (urls[i] for i in mine.tolist()):
                for sample in _members(url, found):
                    usable += 1
                    yield sample
            if not usable:
                raise self._hopeless(found)

    def _hopeless(self, found: list[Damage]) -> DamagedSample:
        last = f": {found[-1].shard}: {found[-1].key} ({found[-1].reason})" if found else ", they are empty"
        return DamagedSample(f"nothing in the shards of {self.source.place} can be used{last}")


def _members(url: str, found: list[Damage]) -> Iterator[dict[str, Any]]:
    """Samples of one shard: member name -> bytes. Where it breaks, the rest is left out and put down as damage."""
    name = url.rpartition("/")[2]

    def note(error: Exception) -> bool:
        found.append(Damage(_number(name), name, "", f"{type(error).__name__}: {error.args[0] if error.args else ''}"))
        return True

    try:
        shard = _Shard(url)
        with io.BufferedReader(shard, CHUNK) as stream:
            members = tar_file_expander([{"url": url, "stream": stream}], handler=note)
            yield from group_by_keys(members, handler=note)
            if stream.read().strip(b"\0") or shard.cut():  # tarfile takes either for the end
                note(OSError("it is cut short, or a header in it is damaged: what follows was left out"))
    except OSError as error:
        note(error)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class _Shard(io.RawIOBase):
    """A shard read from its start to its end. Raises OSError."""

    def __init__(self, url: str):
        place, slash, self.name = url.rpartition("/")
        self.origin = storage(place or slash or ".")
        self.at, self.end = 0, self.origin.size(self.name)

    def cut(self) -> bool:
        """Whether the zeros that end an archive are missing."""
        start = max(0, self.end - 2 * BLOCK)
        return bool(self._bytes(start, self.end - start).strip(b"\0"))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self.end - self.at)
        buffer[:size] = self._bytes(self.at, size)
        self.at += size
        return size

    def _bytes(self, offset: int, size: int) -> bytes:
        return patiently(partial(whole, partial(self.origin.read, self.name), offset, size)) if size else b""
