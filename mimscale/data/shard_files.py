"""The shards of a data set as open files: the copy in the node's cache, else where they lie."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from mimscale.data.shard_cache import Cache
from mimscale.data.storage import Storage, is_remote, storage

OPEN_SHARDS = 512
FORGET_EVERY = 4096  # hints; with a cache shards are then opened anew, or evicted ones would keep their space


class _Open:
    """An open file that closes when its last user lets go. `os.pread` needs no position, so forks may share it."""

    def __init__(self, path: Path):
        self.fd = os.open(path, os.O_RDONLY)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self.fd, size, offset)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class ShardFiles:
    """names, keys: [shards], the file's name where it lies and its key in the cache."""

    def __init__(self, place: str, names: Sequence[str], keys: Sequence[str], cache: Cache | None):
        self.place, self.names, self.keys, self.cache = place, names, keys, cache
        self._remote: Storage | None = storage(place) if is_remote(place) else None
        origin = [None if self._remote else Path(place) / name for name in names]
        self._origin = lru_cache(maxsize=OPEN_SHARDS)(lambda shard: _Open(origin[shard]))  # type: ignore[arg-type]
        self._copy = lru_cache(maxsize=OPEN_SHARDS)(lambda shard: _Open(cache.path(keys[shard])))  # type: ignore[union-attr]
        self._hints = 0

    def read(self, shard: int, size: int, offset: int) -> bytes:
        """Fewer bytes where the shard ends before. Raises OSError."""
        if self.cache is not None:
            try:
                return self._copy(shard).read(size, offset)
            except FileNotFoundError:
                pass
        if self._remote is not None:
            return self._remote.read(self.names[shard], offset, size)
        return self._origin(shard).read(size, offset)

    def will_need(self, shard: int, size: int, offset: int) -> None:
        """Start reading from the disk. A hint: returns at once. Raises OSError."""
        self._hints += 1
        if self.cache is not None and self._hints % FORGET_EVERY == 0:
            self.close()
        if self.cache is None or self.cache.path(self.keys[shard]).exists():
            opened = self._origin(shard) if self.cache is None else self._copy(shard)
            os.posix_fadvise(opened.fd, offset, size, os.POSIX_FADV_WILLNEED)

    def distrust(self, shard: int) -> None:
        """Open the shard anew, and not from a copy: that may be what is damaged."""
        if self.cache is not None:
            self.cache.drop(self.keys[shard])
        self.close()

    def close(self) -> None:
        self._origin.cache_clear()
        self._copy.cache_clear()


def cache_key(sha256: str | None, place: str, name: str, size: int) -> str:
    """By content; a shard that was indexed without being read goes by its address and length."""
    if sha256 is not None:
        return sha256
    address = place if is_remote(place) else os.path.abspath(place)
    return hashlib.sha256(f"{address}/{name}/{size}".encode()).hexdigest()
