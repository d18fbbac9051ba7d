"""IDX files (MNIST's format), packed with gzip or not.

A file begins with two zero bytes, 8 for unsigned bytes, the number of dimensions, then each dimension as a big-endian
int32; the values follow. http://yann.lecun.com/exdb/mnist
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mimscale.errors import UserError

GZIP = b"\x1f\x8b"


class IdxFile(NamedTuple):
    """data: the unpacked file. shape: of its values, the first dimension is the number of rows."""

    path: Path
    data: bytes
    shape: tuple[int, ...]

    @property
    def start(self) -> int:
        return 4 + 4 * len(self.shape)

    def values(self) -> NDArray[np.uint8]:
        """uint8 [*shape]"""
        return np.frombuffer(self.data, np.uint8, offset=self.start).reshape(self.shape)


def read_idx(path: Path, dimensions: int) -> IdxFile:
    """A whole file of unsigned bytes. Raises UserError where it is of another kind or length than it says."""
    data = _unpacked(path)
    magic = bytes((0, 0, 8, dimensions))
    start = 4 + 4 * dimensions
    if data[:4] != magic:
        found = data[:4].hex() or "nothing"
        raise UserError(
            f"'{path}' begins with {found}, an IDX file of {dimensions} dimensions with {magic.hex()}; get it again"
        )
    if len(data) < start:
        raise UserError(f"'{path}' is cut short: it ends in its header of {start} bytes; get it again")
    shape = struct.unpack(f">{dimensions}I", data[4:start])
    wanted = start + math.prod(shape)
    if len(data) != wanted:
        what = "is cut short" if len(data) < wanted else "goes on after its end"
        raise UserError(f"'{path}' {what}: {len(data):,} bytes, its header {shape} asks for {wanted:,}; get it again")
    if not wanted > start:
        raise UserError(f"'{path}' holds no values: its header says {shape}; get it again")
    return IdxFile(path, data, shape)


def _unpacked(path: Path) -> bytes:
    """By content, not by name."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data[:2] == GZIP else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"'{path}' is a damaged gzip file ({error}); get it again") from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror or error}") from None
