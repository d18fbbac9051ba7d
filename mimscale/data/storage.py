"""Where the files of a data set lie: a local folder, http(s), or s3 and gs through fsspec. Reads ranges, nothing else.

Every failure is an OSError, so that local and remote trouble are handled alike. Nothing is ever handed to a shell, and
no credentials are taken from an address: they come from the environment, as the cloud's own tools read them.
"""

from __future__ import annotations

import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, urlsplit

from mimscale.errors import UserError

TIMEOUT_S = 30.0  # without a byte
SCHEMES = ("http", "https", "s3", "gs")
TRIES, PAUSE_S = 5, 0.5  # of `patiently`; each pause is twice the one before

T = TypeVar("T")


class Storage(Protocol):
    def read(self, name: str, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size) of a file, fewer where it ends before. Raises OSError."""

    def size(self, name: str) -> int:
        """Length in bytes. Raises OSError."""


def is_remote(place: str | Path) -> bool:
    return "://" in str(place)


def storage(place: str | Path) -> Storage:
    """Raises UserError for an address of another kind, and for one that holds credentials."""
    if not is_remote(place):
        return Local(Path(place))
    address = urlsplit(str(place))
    if address.scheme not in SCHEMES:
        raise UserError(f"'{address.scheme}://' cannot be read; use a folder or one of {', '.join(SCHEMES)}")
    if "@" in address.netloc or address.query:
        shown = f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path}"
        raise UserError(f"'{shown}' was given with credentials in it; take them out and put them in the environment")
    return Http(str(place)) if address.scheme.startswith("http") else Bucket(str(place))


def patiently(work: Callable[[], T]) -> T:
    """A server may be restarting, and one that stalls or cuts an answer short is asked again. Raises OSError."""
    for attempt in range(TRIES - 1):
        try:
            return work()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(PAUSE_S * 2**attempt)
    return work()


class Local:
    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, name: str, offset: int, size: int) -> bytes:
        fd = os.open(self.folder / name, os.O_RDONLY)
        try:
            return os.pread(fd, size, offset)
        finally:
            os.close(fd)

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size


class Http:
    """A web server that knows range requests."""

    def __init__(self, place: str):
        self.place = place.rstrip("/")

    def read(self, name: str, offset: int, size: int) -> bytes:
        def take(answer: Any) -> bytes:
            if answer.status != 206:
                raise OSError("the server does not know range requests")
            return answer.read()

        return self._ask(name, {"Range": f"bytes={offset}-{offset + size - 1}"}, "GET", take)

    def size(self, name: str) -> int:
        return self._ask(name, {}, "HEAD", lambda answer: int(answer.headers["Content-Length"]))

    def _ask(self, name: str, headers: dict[str, str], method: str, take: Callable[[Any], Any]) -> Any:
        request = urllib.request.Request(f"{self.place}/{quote(name)}", headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return take(answer)
        except (OSError, HTTPException, ValueError, TypeError) as error:
            kind = FileNotFoundError if getattr(error, "code", 0) in (404, 410) else OSError
            raise kind(f"'{self.place}/{name}': {error or type(error).__name__}") from error


class Bucket:
    """An object store through fsspec. Each process makes its own connection: they do not survive a fork."""

    def __init__(self, place: str):
        self.scheme, self.root = urlsplit(place).scheme, place.split("://", 1)[1].rstrip("/")
        self._owner, self._system = -1, None
        try:
            import fsspec

            fsspec.get_filesystem_class(self.scheme)
        except ImportError as error:
            raise UserError(f"'{place}' needs more packages ({error}); pip install 'mimscale[remote]'") from None

    def read(self, name: str, offset: int, size: int) -> bytes:
        return self._try(name, lambda path: self._connected().cat_file(path, start=offset, end=offset + size))

    def size(self, name: str) -> int:
        return self._try(name, lambda path: int(self._connected().info(path)["size"]))

    def _connected(self) -> Any:
        if self._owner != os.getpid():
            import fsspec

            waits = {"connect_timeout": TIMEOUT_S, "read_timeout": TIMEOUT_S}
            options = {"config_kwargs": waits} if self.scheme == "s3" else {"timeout": TIMEOUT_S}
            self._system = fsspec.filesystem(self.scheme, skip_instance_cache=True, use_listings_cache=False, **options)
            self._owner = os.getpid()
        return self._system

    def _try(self, name: str, work: Callable[[str], Any]) -> Any:
        try:
            return work(f"{self.root}/{name}")
        except Exception as error:  # each store has exceptions of its own
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
            raise kind(f"'{self.scheme}://{self.root}/{name}': {type(error).__name__}: {error}") from error
