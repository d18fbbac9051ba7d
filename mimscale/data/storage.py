"""Storage of the files of a data set: a local folder, http(s), or s3 and gs through fsspec. Reads byte ranges only.

Every failure is an OSError, so local and remote errors are handled in the same way. Nothing is passed to a shell. A URL
must not hold credentials: they come from the environment, where the tools of the cloud provider read them too.
"""

from __future__ import annotations

import os
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, urlsplit

from mimscale.errors import UserError, without_secrets

TIMEOUT_S = 30.0  # without receiving a byte
SCHEMES = ("http", "https", "s3", "gs")
TRIES, PAUSE_S = 5, 0.5  # of `with_retries`; each pause is twice the previous one

T = TypeVar("T")


class Storage(Protocol):
    def read(self, name: str, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size) of a file, fewer if it ends earlier. Raises OSError."""

    def size(self, name: str) -> int:
        """Length in bytes. Raises OSError."""

    def names(self) -> list[str]:
        """Names of the files. Raises OSError, or NotImplementedError if there is no list of them."""


class NotOffered(OSError):
    """The server does not do what is needed; asking again would not change that."""


def is_remote(location: str | Path) -> bool:
    return "://" in str(location)


def storage(location: str | Path) -> Storage:
    """The storage for a folder or URL. Raises UserError for another URL scheme and for a URL with credentials."""
    if not is_remote(location):
        return LocalFolder(Path(location))
    url = urlsplit(str(location))
    if url.scheme not in SCHEMES:
        raise UserError(f"'{url.scheme}://' cannot be read; use a folder or one of {', '.join(SCHEMES)}")
    refuse_secrets(str(location))
    return HttpServer(str(location)) if url.scheme.startswith("http") else Bucket(str(location))


def refuse_secrets(address: str) -> None:
    """Raises UserError for a URL with a user, a query or a fragment, which would get into the run's folder and log."""
    if without_secrets(address) != address:
        raise UserError(f"'{address}' was given with credentials in it; remove them and set them in the environment")


def with_retries(request: Callable[[], T]) -> T:
    """Repeat a request that fails, e.g. while a server restarts or if an answer is cut short. Raises OSError."""
    for attempt in range(TRIES - 1):
        try:
            return request()
        except (FileNotFoundError, NotOffered):
            raise
        except OSError:
            time.sleep(PAUSE_S * 2**attempt)
    return request()


class LocalFolder:
    """A folder of a mounted file system."""

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, name: str, offset: int, size: int) -> bytes:
        fd = os.open(self.folder / name, os.O_RDONLY)
        try:
            return os.pread(fd, size, offset)
        finally:
            os.close(fd)

    def size(self, name: str) -> int:
        status = (self.folder / name).stat()
        if not stat.S_ISREG(status.st_mode):  # reading a named pipe would never end
            raise NotOffered(f"'{self.folder / name}' is no regular file")
        return status.st_size

    def names(self) -> list[str]:
        return os.listdir(self.folder)


class _OnlyHttpRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would follow a web server to ftp://."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise OSError(f"the server redirects to {newurl} which is not http(s)")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_OnlyHttpRedirects)


class HttpServer:
    """A web server that supports range requests."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    def read(self, name: str, offset: int, size: int) -> bytes:
        def body(response: Any) -> bytes:
            if response.status != 206:
                raise NotOffered("the server does not answer range requests; use one that does, or copy the files")
            return response.read()

        return self._request(name, {"Range": f"bytes={offset}-{offset + size - 1}"}, "GET", body)

    def size(self, name: str) -> int:
        def length(response: Any) -> int:
            if "Content-Length" not in response.headers:
                raise NotOffered("the server does not give the length; use one that does, or copy the files")
            return int(response.headers["Content-Length"])

        return self._request(name, {}, "HEAD", length)

    def names(self) -> list[str]:
        raise NotImplementedError

    def _request(self, name: str, headers: dict[str, str], method: str, result: Callable[[Any], Any]) -> Any:
        escaped = quote(name, safe="/%", errors="surrogateescape")  # not %: an address may be escaped already
        request = urllib.request.Request(f"{self.url}/{escaped}", headers=headers, method=method)
        try:
            with _OPENER.open(request, timeout=TIMEOUT_S) as response:
                return result(response)
        except (OSError, HTTPException, ValueError, TypeError) as error:
            missing = getattr(error, "code", 0) in (404, 410)
            kind = FileNotFoundError if missing else NotOffered if isinstance(error, NotOffered) else OSError
            raise kind(without_secrets(f"'{self.url}/{name}': {error or type(error).__name__}")) from error


class Bucket:
    """A bucket of an object store, through fsspec. Each process opens a connection: one does not survive a fork."""

    def __init__(self, url: str):
        self.scheme, self.root = urlsplit(url).scheme, url.split("://", 1)[1].rstrip("/")
        self._owner_pid, self._filesystem = -1, None
        try:
            import fsspec

            fsspec.get_filesystem_class(self.scheme)
        except ImportError as error:
            raise UserError(f"'{url}' needs more packages ({error}); pip install -e '.[remote]'") from None

    def read(self, name: str, offset: int, size: int) -> bytes:
        return self._request(name, lambda path: self._connect().cat_file(path, start=offset, end=offset + size))

    def size(self, name: str) -> int:
        return self._request(name, lambda path: int(self._connect().info(path)["size"]))

    def names(self) -> list[str]:
        found = self._request("", lambda path: self._connect().ls(path, detail=False))
        return [path.rstrip("/").rpartition("/")[2] for path in found]

    def _connect(self) -> Any:
        if self._owner_pid != os.getpid():
            import fsspec

            timeouts = {"connect_timeout": TIMEOUT_S, "read_timeout": TIMEOUT_S}
            options: dict[str, Any] = {"config_kwargs": timeouts} if self.scheme == "s3" else {"timeout": TIMEOUT_S}
            self._filesystem = fsspec.filesystem(
                self.scheme, skip_instance_cache=True, use_listings_cache=False, **options
            )
            self._owner_pid = os.getpid()
        return self._filesystem

    def _request(self, name: str, request: Callable[[str], Any]) -> Any:
        try:
            return request(f"{self.root}/{name}")
        except Exception as error:  # each object store has its own exceptions
            refused = isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError"  # of botocore
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else NotOffered if refused else OSError
            what = f"'{self.scheme}://{self.root}/{name}': {type(error).__name__}: {error}"
            raise kind(without_secrets(what)) from error
