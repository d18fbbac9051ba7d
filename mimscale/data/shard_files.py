"""The shards of a data set as open files: the copy in the cache of the node if there is one, else the original."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from mimscale.data.shard_cache import Cache
from mimscale.data.storage import Storage, is_remote, storage

OPEN_SHARDS = 512
CLOSE_EVERY = (
    4096  # hints; with a cache all shards are then closed, because an open file keeps its space after eviction
)


class _OpenFile:
    """An open file, closed with its last reference. Forked processes may share it: `os.pread` uses no position."""

    def __init__(self, path: Path):
        self.fd = os.open(path, os.O_RDONLY)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self.fd, size, offset)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class ShardFiles:
    """names, keys: [shards], file name in `location` and key in the cache."""

    def __init__(self, location: str, names: Sequence[str], keys: Sequence[str], cache: Cache | None):
        self.names, self.keys, self.cache = names, keys, cache
        self._remote: Storage | None = storage(location) if is_remote(location) else None
        paths = [None if self._remote else Path(location) / name for name in names]
        self._original = lru_cache(maxsize=OPEN_SHARDS)(lambda shard: _OpenFile(paths[shard]))  # type: ignore[arg-type]
        self._copy = lru_cache(maxsize=OPEN_SHARDS)(lambda shard: _OpenFile(cache.path(keys[shard])))  # type: ignore[union-attr]
        self._hints = 0

    def read(self, shard: int, size: int, offset: int) -> bytes:
        """Bytes [offset, offset + size) of a shard, fewer if it ends earlier. Raises OSError."""
        if self.cache is not None:
            try:
                return self._copy(shard).read(size, offset)
            except FileNotFoundError:
                pass
        if self._remote is not None:
            return self._remote.read(self.names[shard], offset, size)
        return self._original(shard).read(size, offset)

    def will_need(self, shard: int, size: int, offset: int) -> None:
        """Hint that these bytes will be read soon (posix_fadvise). Returns at once. Raises OSError."""
        self._hints += 1
        if self.cache is not None and self._hints % CLOSE_EVERY == 0:
            self.close()
        if self.cache is None or self.cache.path(self.keys[shard]).exists():
            file = self._original(shard) if self.cache is None else self._copy(shard)
            os.posix_fadvise(file.fd, offset, size, os.POSIX_FADV_WILLNEED)

    def reopen(self, shard: int) -> None:
        """Let the next read open the original: the cached copy may be damaged, so it is removed."""
        if self.cache is not None:
            self.cache.remove(self.keys[shard])
        self.close()

    def close(self) -> None:
        self._original.cache_clear()
        self._copy.cache_clear()


def cache_key(sha256: str | None, location: str, name: str, size: int) -> str:
    """The sha256 of the shard; for a shard that was indexed without checksum a hash of its location and length."""
    if sha256 is not None:
        return sha256
    base = location if is_remote(location) else os.path.abspath(location)
    return hashlib.sha256(f"{base}/{name}/{size}".encode()).hexdigest()
