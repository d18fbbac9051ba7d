"""The shards of a folder, a bucket or a web server."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

from data_prep.splits import chosen_files
from data_prep.tar import File, open_for_reading
from mimscale.data.sidecars import is_sidecar
from mimscale.data.storage import Storage, is_remote, storage, with_retries
from mimscale.errors import UserError, warn

SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.tar")
PACKED = re.compile(r".*\.(tar\.(gz|zst|xz|bz2|lz4|Z)|tgz|tbz2?|txz|tzst)", re.IGNORECASE)
WINDOW = 4 << 20  # bytes of one request to a server: a header and most of the members that follow


@dataclass(frozen=True)
class ShardList:
    """location: a folder or URL. names: of the shards, sorted, also compressed ones. skipped: other files, counted."""

    location: str
    names: list[str]
    skipped: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def open(self, name: str) -> Iterator[File]:
        """Raises UserError or OSError."""
        if not is_remote(self.location):
            with open_for_reading(Path(self.location) / name) as fd:
                yield fd
        else:
            yield RemoteFile(_origin(self.location), name)

    def identity(self, name: str) -> tuple[int, int]:
        """(length in bytes, time of modification in ns, 0 on a server): it changes with the shard. Raises OSError."""
        if is_remote(self.location):
            return with_retries(partial(_origin(self.location).size, name)), 0
        status = (Path(self.location) / name).stat()
        return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=4)
def _origin(location: str) -> Storage:
    """One connection per process."""
    return storage(location)


class RemoteFile:
    """A file on a server, read from start to end in requests of WINDOW bytes; larger gaps are passed over."""

    def __init__(self, origin: Storage, name: str):
        self.origin, self.name = origin, name
        self.length = with_retries(partial(origin.size, name))
        self._start, self._data = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size), fewer if the file ends earlier. Raises OSError."""
        size = max(0, min(size, self.length - offset))
        if not (self._start <= offset and offset + size <= self._start + len(self._data)):
            length = min(max(size, WINDOW), self.length - offset)
            self._start, self._data = offset, self._fetch(offset, length) if length > 0 else b""
        return self._data[offset - self._start : offset - self._start + size]

    def _fetch(self, offset: int, size: int) -> bytes:
        def request() -> bytes:
            data = self.origin.read(self.name, offset, size)
            if len(data) != size:
                raise OSError(f"'{self.name}': {len(data):,} of {size:,} bytes at {offset:,}")
            return data

        return with_retries(request)


def list_shards(source: str, pattern: str | None = None) -> ShardList:
    """The .tar files, also compressed ones, of a folder or of a bucket (s3://, gs://); of a web server, which has no
    list of its files, those that braces name: https://host/part-{000..127}.tar. pattern: of the names, see
    `chosen_files`. Raises UserError.
    """
    below = 0
    if is_remote(source):
        location, found = _remote_names(source)
    else:
        location = source.rstrip("/") or "/"
        folder = Path(location)
        if not folder.is_dir():
            raise UserError(f"shards '{source}': no such folder")
        paths = list(folder.iterdir())
        found = [path.name for path in paths]
        below = sum(len(list(path.glob("*.tar"))) for path in paths if path.is_dir() and not is_sidecar(path.name))
    wanted = sorted(name for name in found if name.lower().endswith(".tar") or PACKED.fullmatch(name))
    names = [name for name in wanted if not name.startswith(".")]
    if not names:
        raise UserError(f"'{source}' holds no .tar files; give the folder of the shards")
    if below:
        warn(
            f"'{source}': {below:,} shards in folders below are not read; each of these folders has an index of its own"
        )
    skipped = Counter({"hidden": len(wanted) - len(names)})
    chosen = chosen_files(Path(location), [Path(name) for name in names], pattern)
    return ShardList(location, [path.name for path in chosen], +skipped)


def _remote_names(source: str) -> tuple[str, list[str]]:
    if "{" in source:
        location, _, last = source.rpartition("/")
        if "{" in location:
            raise UserError(f"'{source}': braces may be in the name of the shards only, not in their folder")
        return location, _expanded(last)
    location = source.rstrip("/")
    origin = _origin(location)
    try:
        names = with_retries(origin.names)
    except NotImplementedError:
        raise UserError(
            f"'{source}': a web server has no list of its files; give their names, {location}/part-{{000..127}}.tar"
        ) from None
    except OSError as error:
        raise UserError(f"shards '{source}' cannot be listed: {error}") from None
    return location, names


def _expanded(name: str) -> list[str]:
    from webdataset.shardlists import expand_urls

    try:
        return list(expand_urls(name))
    except ValueError as error:
        raise UserError(f"'{name}': {error}; write part-{{000..127}}.tar") from None
