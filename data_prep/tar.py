"""Tar archives by their headers alone: where every file lies, without reading or unpacking it.

Strict where Python's tarfile is not: that takes a damaged header for the end of an archive, and a missing end for an
end. Here half a download is an error, and so is whatever a data set has no use for: links, devices, names that lead out
of a folder. Nothing is ever written to the disk or executed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from mimscale.errors import UserError

BLOCK = 512  # tar's unit: a header is one block, contents are padded to whole blocks
RECORD = 20 * BLOCK  # archives are padded to whole records, after two empty blocks
MAX_EXTENSION = 1 << 20  # bytes of a long name or of a pax header
_EMPTY = bytes(BLOCK)
_ODD_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a named pipe"}


class BadArchive(UserError):
    """Not a whole tar archive of plain files."""


class Member(NamedTuple):
    """A file inside an archive: `size` bytes at `offset` of the file that holds the archive. start: its first bytes."""

    name: str
    offset: int
    size: int
    start: bytes


def padded(size: int, unit: int = BLOCK) -> int:
    return -(-size // unit) * unit


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor for reading. Raises UserError."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"archive '{path}' cannot be read: {error.strerror}") from None
    try:
        yield fd
    finally:
        os.close(fd)


def members(fd: int, path: Path, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """The files of the archive that lies at [start, end) of an open file (default: all of it), in their order.

    Reads two blocks per member. Knows ustar, GNU and pax headers. Raises BadArchive, with the place, for what is not
    a whole archive of plain files and folders; `path` is for its message.
    """
    end = os.fstat(fd).st_size if end is None else end
    at, long_name, long_size = start, None, None
    while True:
        head = os.pread(fd, 2 * BLOCK, at) if at + BLOCK <= end else b""
        header = head[:BLOCK]
        if header == _EMPTY:
            return
        if len(header) < BLOCK or not _checksum_fits(header):
            raise BadArchive(
                f"'{path}' is not a whole tar archive: no member and no end at byte {at:,}; fetch or make it again"
            )
        size, kind = _number(header[124:136]), header[156:157]
        if long_size is not None and kind in b"0\0":
            size = long_size
        data, at = at + BLOCK, at + BLOCK + padded(size)
        if size < 0 or at > end:
            raise BadArchive(f"'{path}' is not a whole tar archive: it ends inside the member at byte {data - BLOCK:,}")
        if kind in b"LKxg":
            if size > MAX_EXTENSION:
                raise BadArchive(f"'{path}': an extended header of {size:,} bytes at byte {data - BLOCK:,}")
            if kind == b"L":
                long_name = os.pread(fd, size, data).rstrip(b"\0").decode(errors="surrogateescape")
            elif kind == b"x":
                long_name, long_size = _pax(os.pread(fd, size, data), long_name)
            continue
        name = long_name or _name(header)
        long_name = long_size = None
        if kind in (b"0", b"\0", b"7"):
            if name.startswith("/") or ".." in name.split("/") or not name:
                raise BadArchive(f"'{path}': refused the member '{name}', whose name leads out of the archive")
            if not name.endswith("/"):  # so old archives mark a folder
                yield Member(name, data, size, head[BLOCK : BLOCK + size])
        elif kind != b"5":
            raise BadArchive(f"'{path}': refused the member '{name}': {_ODD_KINDS.get(kind, 'not a plain file')}")


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode(errors="surrogateescape")


def _number(text: bytes) -> int:
    """Octal digits, or, with the first bit set, a big-endian binary number. -1 where it is neither."""
    if text[0] & 0x80:
        return int.from_bytes(text[1:], "big")
    try:
        return int(text.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return -1


def _checksum_fits(header: bytes) -> bool:
    stored, field = _number(header[148:156]), header[148:156]
    if sum(header) - sum(field) + 256 == stored:
        return True
    signed = sum(byte - 256 if byte > 127 else byte for byte in header[:148] + header[156:])  # some old programs
    return signed + 256 == stored


def _pax(data: bytes, name: str | None) -> tuple[str | None, int | None]:
    """Records "LENGTH KEY=VALUE\\n" -> the member's name and size, where they say so."""
    size = None
    while data:
        length = int(digits) if (digits := data.split(b" ", 1)[0]).isdigit() else 0
        key, found, value = data[len(digits) + 1 : length - 1].partition(b"=")
        if not found:
            break
        if key == b"path":
            name = value.decode(errors="surrogateescape")
        elif key == b"size" and value.isdigit():
            size = int(value)
        data = data[length:]
    return name, size
