"""A cache of shards on the local disk of a node, shared by all processes of the node. Layout of the folder data.cache:

shards/KEY.tar     a complete shard; KEY is the sha256 of its contents, so keys cannot collide and copies can be checked
shards/.KEY.BYTES.PID.tmp  a shard that is being copied, with its final length; leftovers of dead processes are removed
                   by processes that start later
locks/KEY          held while a shard is copied, so that only one process of the node copies it; locks/room while shards
                   are evicted
wanted/PID         the keys that a process still needs; shards that no live process needs may be evicted

A file has its final name only when it is complete. A reader can go on reading an open shard after it was evicted.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from mimscale.data.config import DataConfig
from mimscale.data.storage import with_retries
from mimscale.errors import UserError
from mimscale.files.atomic import atomic_stream, atomic_write, remove_leftovers

Read = Callable[[int, int], bytes]  # (offset, size)
CHUNK = 8 << 20


class Cache:
    """folder: see the module. limit: maximum size of all shards together, in bytes."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        for name in ("shards", "locks", "wanted"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    @classmethod
    def from_config(cls, data: DataConfig) -> Cache | None:
        """None if the recipe sets no cache. Raises UserError if the folder cannot be made."""
        if data.cache is None:
            return None
        try:
            return cls(data.cache, int(data.cache_gib * 2**30))
        except OSError as error:
            raise UserError(f"data.cache = '{data.cache}' cannot be made: {error.strerror}") from None

    def path(self, key: str) -> Path:
        return self.folder / "shards" / f"{key}.tar"

    def set_wanted(self, keys: Iterable[str]) -> None:
        """Replace the list of keys that this process needs."""
        atomic_write(self.folder / "wanted" / str(os.getpid()), json.dumps(sorted(keys)).encode())

    def fetch(self, key: str, size: int, sha256: str | None, read: Read) -> bool:
        """Copy a shard into the cache. Returns whether it is there now.

        False if the cache is full or another process is copying this shard. Raises OSError if the shard cannot be read
        or does not have this sha256.
        """
        if self.path(key).exists():
            return True
        with self._lock(key, fcntl.LOCK_NB) as acquired:
            if not acquired:
                return False
            if self.path(key).exists():
                return True
            temporary = self.path(key).with_name(f".{key}.{size}.{os.getpid()}.tmp")
            if not self._reserve(temporary, size):
                return False
            try:
                with atomic_stream(self.path(key), temporary) as file:
                    _copy(file, size, sha256, read)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    return False
                raise
            return True

    def remove(self, key: str) -> None:
        """Remove a copy that turned out to be damaged."""
        self.path(key).unlink(missing_ok=True)

    def clean_up(self) -> None:
        """Remove the unfinished copies and the lists of dead processes."""
        for path in (self.folder / "shards").glob(".*.tmp"):
            if not _alive(path.name.split(".")[-2]):
                path.unlink(missing_ok=True)
        remove_leftovers(self.folder / "wanted")
        self._wanted_keys()

    def _wanted_keys(self) -> set[str]:
        """The keys that live processes need. Removes the lists of dead ones."""
        keys: set[str] = set()
        for path in (self.folder / "wanted").iterdir():
            if path.name.startswith("."):
                continue
            if not _alive(path.name):
                path.unlink(missing_ok=True)
                continue
            with suppress(OSError, ValueError, TypeError):  # another program's
                keys |= set(json.loads(path.read_text()))
        return keys

    def _reserve(self, temporary: Path, size: int) -> bool:
        """Evict shards until `size` bytes fit, and reserve them by creating the temporary file.

        One process at a time, otherwise several would use the same free space.
        """
        with self._lock("room"):
            if not self._evict(size):
                return False
            temporary.touch()
            return True

    def _evict(self, size: int) -> bool:
        """Remove shards that no process needs, oldest first, until `size` more bytes fit. Returns whether they fit."""
        self.clean_up()
        files = []
        for path in (self.folder / "shards").iterdir():
            with suppress(FileNotFoundError):
                length = int(path.name.split(".")[2]) if path.suffix == ".tmp" else path.stat().st_size
                files.append((path.stat().st_mtime_ns, length, path))
        used, wanted = sum(size for _, size, _ in files), self._wanted_keys()
        for _, freed, path in sorted(files):
            if used + size <= self.limit:
                return True
            if path.suffix == ".tar" and path.stem not in wanted:
                path.unlink(missing_ok=True)
                used -= freed
        return used + size <= self.limit

    @contextmanager
    def _lock(self, key: str, flags: int = 0) -> Iterator[bool]:
        """Hold a lock. flags: 0 waits for it; with fcntl.LOCK_NB the value is False if another process has it."""
        with (self.folder / "locks" / key).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | flags)
            except BlockingIOError:
                yield False
                return
            yield True


def _copy(file: BinaryIO, size: int, sha256: str | None, read: Read) -> None:
    digest = hashlib.sha256()
    for offset in range(0, size, CHUNK):
        chunk = with_retries(partial(read_exactly, read, offset, min(CHUNK, size - offset)))
        digest.update(chunk)
        file.write(chunk)
    if sha256 is not None and digest.hexdigest() != sha256:
        raise OSError(f"sha256 {digest.hexdigest()}, not {sha256}: the shard is damaged, or it is another one")


def read_exactly(read: Read, offset: int, size: int) -> bytes:
    """Raises OSError if there are fewer than `size` bytes."""
    data = read(offset, size)
    if len(data) != size:
        raise OSError(f"{len(data)} of {size} bytes at {offset}")
    return data


def _alive(pid: str) -> bool:
    return pid.isdigit() and Path(f"/proc/{pid}").exists()
