"""Lists the members of tar archives from their headers, without reading or unpacking the files.

Stricter than Python's tarfile, which treats a damaged header or a missing end marker as the end of the archive. Here an
incomplete download is an error, and so are members that a data set must not have: symbolic links, devices, and names
that lead out of the folder. A hard link stands for the earlier member that it names. Zero blocks are not taken for the
end: a joined archive behind them is read too, and anything else behind them is an error. Nothing is written to the disk
or executed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from data_prep.file_kinds import START_BYTES, kind_of
from mimscale.data.names import one_line
from mimscale.data.packed import LONGEST, compression, unpack
from mimscale.data.tar_end import BLOCK, RECORD, RestOfArchive, is_header, joined_archive, number
from mimscale.errors import UserError

__all__ = ["BLOCK", "RECORD", "BadArchive", "File", "Member", "members", "open_for_reading", "padded_size", "read_at"]

MAX_EXTENDED_HEADER = 1 << 20  # bytes of a long name or a pax header
_EMPTY = bytes(BLOCK)
SPARSE = "a sparse file, of which the archive has the parts only; pack it again without --sparse"
_REFUSED_KINDS = {
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a named pipe",
    b"S": SPARSE,
}


class Remote(Protocol):
    """A file that is not on this machine. length: in bytes."""

    length: int

    def read(self, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size), fewer if the file ends earlier. Raises OSError."""


File = int | Remote  # an open file by its descriptor, or one on a server


def read_at(file: File, size: int, offset: int) -> bytes:
    """As `os.pread`. Raises OSError."""
    return os.pread(file, size, offset) if isinstance(file, int) else file.read(offset, size)


def size_of(file: File) -> int:
    """Length in bytes."""
    return os.fstat(file).st_size if isinstance(file, int) else file.length


class BadArchive(UserError):
    """Not a complete tar archive of regular files."""


class Member(NamedTuple):
    """A file inside an archive: `size` bytes at `offset` of the file that holds the archive. start: its first bytes."""

    name: str
    offset: int
    size: int
    start: bytes


def padded_size(size: int, unit: int = BLOCK) -> int:
    return -(-size // unit) * unit


@contextmanager
def open_for_reading(path: Path) -> Iterator[int]:
    """A file descriptor. Raises UserError."""
    if path.is_dir():
        raise UserError(f"archive '{path}' is a folder; give the .tar file, or for a folder of images the verb folder")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe would wait for its writer
    except OSError as error:
        raise UserError(f"archive '{path}' cannot be read: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UserError(f"archive '{path}' is no regular file; give the .tar file itself")
        yield fd
    finally:
        os.close(fd)


def members(
    file: File, path: Path | str, start: int = 0, end: int | None = None, *, archive: int | None = None
) -> Iterator[Member]:
    """The regular files of the archive at bytes [start, end) of an open file (default: all of it), in archive order.

    archive: where the archive begins, if `start` is a later member of it; hard links are passed over then.

    Reads two blocks per member. Supports ustar, GNU and pax headers, hard links to earlier members, and archives that
    are joined. Raises BadArchive, with the offset, for anything but complete archives of regular files and folders;
    `path` is for the message.
    """
    end = size_of(file) if end is None else end
    packed = compression(read_at(file, LONGEST, start)) if archive is None else None
    if packed is not None:
        where = f"the member at byte {start:,} of '{path}'" if start else f"'{path}'"
        raise BadArchive(f"{where} is compressed ({packed}), so its members have no offsets; {unpack(path, packed)}")
    offset, long, known = start, _Extended(), dict[str, tuple[int, int]]()  # place and size of each member so far
    whole, start = archive is None, start if archive is None else archive
    while True:
        head = read_at(file, 2 * BLOCK, offset) if offset + BLOCK <= end else b""
        header = head[:BLOCK]
        if header == _EMPTY:
            try:
                following = joined_archive(lambda at, length: read_at(file, length, at), start, offset, end)
            except RestOfArchive as rest:
                raise BadArchive(f"'{path}' is not a complete tar archive: {rest}; download or make it again") from None
            if following is None:
                return
            start = offset = following
            continue
        if offset == end and end > start:
            raise BadArchive(
                f"'{path}' is not a complete tar archive: no end mark behind the last member at byte {end:,}, since it "
                "was not closed or is truncated there; download or make it again, or if nothing is missing, add the "
                "mark (truncate -s +1024 FILE)"
            )
        if len(header) < BLOCK or not is_header(header):
            found = kind_of(read_at(file, START_BYTES, offset)) if offset == start else None
            raise BadArchive(
                f"'{path}' is not a complete tar archive: no member and no end at byte {offset:,}"
                f"{f', but {found}' if found else ''}; download or make it again"
            )
        size, kind = number(header[124:136]), header[156:157]
        if long.size is not None and kind in b"0\0":
            size = long.size
        if kind in b"15":
            size = 0  # whatever it says: a hard link has the contents of another member, and a folder none (POSIX)
        data, offset = offset + BLOCK, offset + BLOCK + padded_size(size)
        if size < 0 or offset > end:
            raise BadArchive(
                f"'{path}' is not a complete tar archive: it ends inside the member at byte {data - BLOCK:,}; "
                "download or make it again"
            )
        if kind in b"LKxg":
            if size > MAX_EXTENDED_HEADER:
                raise BadArchive(f"'{path}': an extended header of {size:,} bytes at byte {data - BLOCK:,}")
            if kind == b"L":
                long = long._replace(name=_text(read_at(file, size, data).rstrip(b"\0")))
            elif kind == b"K":
                long = long._replace(link=_text(read_at(file, size, data).rstrip(b"\0")))
            elif kind == b"x":
                long = _pax(read_at(file, size, data), long)
            continue
        name, link = long.name or _name(header), long.link or _text(header[157:257].split(b"\0", 1)[0])
        if long.sparse:
            raise BadArchive(f"{_refused(path, name)}: {SPARSE}")
        long = _Extended()
        if kind in (b"0", b"\0", b"7", b"1"):
            if name.startswith("/") or ".." in name.split("/") or not name:
                raise BadArchive(f"{_refused(path, name)}, whose name leads out of the archive")
            if kind == b"1":
                if whole:
                    yield _linked(file, path, name, link, known)
            elif not name.endswith("/"):  # old archives mark a folder in this way
                yield Member(name, data, size, head[BLOCK : BLOCK + size])
            if kind != b"1":
                known[_plain(name)] = data, size
            elif _plain(link) in known:
                known[_plain(name)] = known[_plain(link)]
        elif kind != b"5":
            raise BadArchive(f"{_refused(path, name)}: {_REFUSED_KINDS.get(kind, 'not a regular file')}")


class _Extended(NamedTuple):
    """What headers before a member's own say of it; None = nothing."""

    name: str | None = None
    link: str | None = None
    size: int | None = None
    sparse: bool = False


def _linked(file: File, path: Path | str, name: str, link: str, known: Mapping[str, tuple[int, int]]) -> Member:
    """The member that a hard link stands for, under the name of the link. Raises BadArchive."""
    if _plain(link) not in known:
        raise BadArchive(f"{_refused(path, name)}: a hard link to '{one_line(link)}', which is not a file before it")
    offset, size = known[_plain(link)]
    return Member(name, offset, size, read_at(file, min(BLOCK, size), offset))


def _plain(name: str) -> str:
    while name.startswith("./"):
        name = name[2:]
    return name


def _refused(path: Path | str, name: str) -> str:
    return f"'{path}': refused the member '{one_line(name)}'"


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode(errors="surrogateescape")


def _text(name: bytes) -> str:
    return name.decode(errors="surrogateescape")


def _pax(data: bytes, long: _Extended) -> _Extended:
    """Records "LENGTH KEY=VALUE\\n" of a member; a field is unchanged if not given, and the size None."""
    long = long._replace(size=None)
    while data:
        length = int(digits) if (digits := data.split(b" ", 1)[0][:10]).isdigit() else 0
        key, found, value = data[len(digits) + 1 : length - 1].partition(b"=")
        if not found or length <= len(digits):
            break
        if key == b"path":
            long = long._replace(name=_text(value))
        elif key == b"linkpath":
            long = long._replace(link=_text(value))
        elif key.startswith(b"GNU.sparse."):
            long = long._replace(sparse=True)
        elif key == b"size" and value.isdigit() and len(value) < 20:
            long = long._replace(size=int(value))
        data = data[length:]
    return long
