"""Whole shards on a node's own disk, shared by all its processes: DATA.CACHE/

shards/KEY.tar     a whole shard; KEY is the sha256 of its contents, so names cannot collide and copies are checked
shards/.KEY.BYTES.PID.tmp  one that is being fetched, and its length at the end; whoever starts later removes what a
                   dead process left
locks/KEY          held while a shard is fetched, so that one process of the node does it; locks/room while room is made
wanted/PID         the keys that a process still needs; what nobody alive needs may go

A file appears under its own name only when it is whole. Readers keep what they have opened, also when it is evicted.
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
from mimscale.data.storage import patiently
from mimscale.errors import UserError
from mimscale.files.atomic import atomic_stream, atomic_write, remove_leftovers

Read = Callable[[int, int], bytes]  # (offset, size)
CHUNK = 8 << 20


class Cache:
    """limit: bytes of all shards together."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        for name in ("shards", "locks", "wanted"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    @classmethod
    def of(cls, data: DataConfig) -> Cache | None:
        """Raises UserError."""
        if data.cache is None:
            return None
        try:
            return cls(data.cache, int(data.cache_gib * 2**30))
        except OSError as error:
            raise UserError(f"data.cache = '{data.cache}' cannot be made: {error.strerror}") from None

    def path(self, key: str) -> Path:
        return self.folder / "shards" / f"{key}.tar"

    def want(self, keys: Iterable[str]) -> None:
        """What this process needs; replaces what it said before."""
        atomic_write(self.folder / "wanted" / str(os.getpid()), json.dumps(sorted(keys)).encode())

    def fetch(self, key: str, size: int, sha256: str | None, read: Read) -> bool:
        """Get a shard unless it is there, or there is no room, or another process is getting it. True: it is there.

        Raises OSError where it cannot be read, or is not what it should be.
        """
        if self.path(key).exists():
            return True
        with self._locked(key, fcntl.LOCK_NB) as mine:
            if not mine:
                return False
            if self.path(key).exists():
                return True
            temporary = self.path(key).with_name(f".{key}.{size}.{os.getpid()}.tmp")
            if not self._claimed(temporary, size):
                return False
            try:
                with atomic_stream(self.path(key), temporary) as file:
                    _copy(file, size, sha256, read)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    return False
                raise
            return True

    def drop(self, key: str) -> None:
        """Forget a copy that turned out to be damaged."""
        self.path(key).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove what dead processes left behind."""
        for path in (self.folder / "shards").glob(".*.tmp"):
            if not _alive(path.name.split(".")[-2]):
                path.unlink(missing_ok=True)
        remove_leftovers(self.folder / "wanted")
        self._wanted()

    def _wanted(self) -> set[str]:
        keys: set[str] = set()
        for path in (self.folder / "wanted").iterdir():
            if path.name.startswith("."):
                continue
            if not _alive(path.name):
                path.unlink(missing_ok=True)
                continue
            with suppress(OSError, json.JSONDecodeError):
                keys |= set(json.loads(path.read_text()))
        return keys

    def _claimed(self, temporary: Path, size: int) -> bool:
        """One process at a time, or several would fill the same room."""
        with self._locked("room"):
            if not self._room(size):
                return False
            temporary.touch()
            return True

    def _room(self, size: int) -> bool:
        """Evict, oldest first, what nobody needs, until `size` more bytes fit under the limit."""
        self.tidy()
        files = []
        for path in (self.folder / "shards").iterdir():
            with suppress(FileNotFoundError):
                length = int(path.name.split(".")[2]) if path.suffix == ".tmp" else path.stat().st_size
                files.append((path.stat().st_mtime_ns, length, path))
        used, wanted = sum(size for _, size, _ in files), self._wanted()
        for _, freed, path in sorted(files):
            if used + size <= self.limit:
                return True
            if path.suffix == ".tar" and path.stem not in wanted:
                path.unlink(missing_ok=True)
                used -= freed
        return used + size <= self.limit

    @contextmanager
    def _locked(self, key: str, wait: int = 0) -> Iterator[bool]:
        """wait: 0, or fcntl.LOCK_NB for False where another process has it."""
        with (self.folder / "locks" / key).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | wait)
            except BlockingIOError:
                yield False
                return
            yield True


def _copy(file: BinaryIO, size: int, sha256: str | None, read: Read) -> None:
    digest = hashlib.sha256()
    for offset in range(0, size, CHUNK):
        chunk = patiently(partial(whole, read, offset, min(CHUNK, size - offset)))
        digest.update(chunk)
        file.write(chunk)
    if sha256 is not None and digest.hexdigest() != sha256:
        raise OSError(f"sha256 {digest.hexdigest()}, not {sha256}: it is damaged, or another shard")


def whole(read: Read, offset: int, size: int) -> bytes:
    """Raises OSError where there is less."""
    data = read(offset, size)
    if len(data) != size:
        raise OSError(f"{len(data)} of {size} bytes at {offset}")
    return data


def _alive(pid: str) -> bool:
    return pid.isdigit() and Path(f"/proc/{pid}").exists()
