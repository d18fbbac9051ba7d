"""What stands behind the zero blocks that end a tar archive.

Zero blocks are not the end of the file: archives may be joined (`cat b.tar >> a.tar`), and a damaged file system leaves
zeros in the middle of an archive. A reader that stops there loses the rest without an error.
"""

from __future__ import annotations

from collections.abc import Callable

BLOCK = 512  # the unit of tar: a header is one block, contents are padded to a multiple of it
RECORD = 20 * BLOCK  # most programs pad an archive to a multiple of this
CHUNK = 1 << 20


class RestOfArchive(ValueError):
    """Bytes behind zero blocks that are not a joined archive. The message gives their offset and size."""


def joined_archive(read: Callable[[int, int], bytes], start: int, zeros: int, end: int) -> int | None:
    """The offset of the archive that follows behind the zero blocks of another; None if all bytes to `end` are zero.

    read: (offset, size) -> bytes. start: where the archive that may end here begins. zeros: offset of its first zero
    block, where its members end. An archive ends with two zero blocks and, with most programs, zeros up to a multiple
    of RECORD; a header at another place than these two means that zeros were written over members. (Zeros over members
    that end at just these places cannot be told from a joined archive.) Raises RestOfArchive.
    """
    position = _not_zero(read, zeros, end)
    if position is None:
        return None
    following = zeros + (position - zeros) // BLOCK * BLOCK
    length = zeros - start + 2 * BLOCK
    places = zeros + 2 * BLOCK, start + -(-length // RECORD) * RECORD
    if following in places and is_header(read(following, min(BLOCK, end - following))):
        return following
    if following == zeros:
        raise RestOfArchive(
            f"it is truncated, or a header in it is damaged: no member and no end at byte {zeros:,}, so "
            f"{end - zeros:,} bytes were left out"
        )
    raise RestOfArchive(
        f"zeros at byte {zeros:,}, then {end - following:,} bytes at byte {following:,} that are no joined archive"
    )


def is_header(block: bytes) -> bool:
    """Whether the checksum of a block is that of a tar header."""
    field = block[148:156]
    checksum = number(field) if len(block) == BLOCK else -1
    if sum(block) - sum(field) + 256 == checksum:
        return True
    signed = sum(byte - 256 if byte > 127 else byte for byte in block[:148] + block[156:])  # by some old programs
    return signed + 256 == checksum


def number(field: bytes) -> int:
    """Octal digits, or, with the first bit set, a big-endian binary number; -1 if it is neither."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return -1


def _not_zero(read: Callable[[int, int], bytes], offset: int, end: int) -> int | None:
    """The offset of the first byte in [offset, end) that is not zero."""
    size = RECORD
    while offset < end:
        data = read(offset, min(size, end - offset))
        rest = data.lstrip(b"\0")
        if rest:
            return offset + len(data) - len(rest)
        if not data:
            return None
        offset, size = offset + len(data), CHUNK
    return None
