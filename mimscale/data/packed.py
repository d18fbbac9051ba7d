"""Compressed files, named by their first bytes, and the command that unpacks them."""

from __future__ import annotations

import shlex
from pathlib import Path

MAGIC = {
    "gzip": b"\x1f\x8b",
    "zstd": b"\x28\xb5\x2f\xfd",
    "xz": b"\xfd7zXZ\0",
    "bzip2": b"BZh",
    "lz4": b"\x04\x22M\x18",
    "compress": b"\x1f\x9d",
}
LONGEST = 6  # bytes, of MAGIC
SUFFIX = {
    "gzip": (".gz", ".tgz"),
    "zstd": (".zst",),
    "xz": (".xz",),
    "bzip2": (".bz2",),
    "lz4": (".lz4",),
    "compress": (".Z",),
}
OPTIONS = {"zstd": " --rm", "lz4": " --rm -m"}  # else they keep the compressed file, and lz4 may write to stdout


def compression(start: bytes) -> str | None:
    """The program whose compressed files begin with these bytes; None if it is none of the usual ones."""
    return next((name for name, magic in MAGIC.items() if start.startswith(magic)), None)


def unpack(path: Path | str, packed: str) -> str:
    """How to make a shard of a compressed file."""
    shown = shlex.quote(str(path)) if "'" in str(path) else f"'{path}'"
    if str(path).endswith(SUFFIX[packed]):
        return f"unpack it: {packed}{OPTIONS.get(packed, '')} -d {shown}"
    return f"unpack it: {packed} -dc {shown} > unpacked, then mv unpacked {shown}"
