"""Reading regular files only: whoever opens a named pipe waits for its writer, and a device may have no end."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path) -> BinaryIO:
    """As `open(path, "rb")`; raises OSError at once for what is no regular file."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    mode = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode):
        file.close()
        raise OSError(errno.EINVAL, f"it is {KINDS.get(stat.S_IFMT(mode), 'no file')}, not a file", str(path))
    return file


def read_regular(path: Path) -> bytes:
    """As `Path.read_bytes`; raises OSError at once for what is no regular file."""
    with open_regular(path) as file:
        return file.read()


def read_head(path: Path, size: int) -> bytes:
    """The first bytes; raises OSError at once for what is no regular file."""
    with open_regular(path) as file:
        return file.read(size)


def open_to_write(path: Path, flags: int) -> int:
    """As `os.open`; raises OSError for a link, because what it points to may be somebody else's."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise OSError(errno.ELOOP, "it is a link, which is not followed", str(path)) from None
        raise


def special_files(place: Path) -> Iterator[tuple[Path, str]]:
    """(path, what it is) of a place and all below it that is a pipe, a socket or a device, also where a link says so.

    Links to folders are not followed. What cannot be listed is passed over: whoever opens it will say so.
    """
    below = (Path(top, name) for top, _, names in os.walk(place) for name in names)
    for path in chain([place], below):
        try:
            kind = KINDS.get(stat.S_IFMT(path.stat().st_mode))
        except OSError:  # a link to nothing, or a file that was removed meanwhile
            continue
        if kind is not None:
            yield path, kind
