"""The bytes of a source's pictures: whole files, places inside of archives, rows of parquet files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from data_prep.plan import Item
from mimscale.errors import UserError

Read = Callable[[Item], bytes]


@contextmanager
def reader() -> Iterator[Read]:
    """Gives a function item -> bytes that keeps the last file open: a big archive is opened once.

    The function raises UserError where a source cannot be read or has changed since it was listed.
    """
    opened: tuple[str, int] | None = None

    def read(item: Item) -> bytes:
        nonlocal opened
        try:
            if opened is None or opened[0] != item.path:
                if opened is not None:
                    os.close(opened[1])
                    opened = None
                opened = item.path, os.open(item.path, os.O_RDONLY)
            data = os.pread(opened[1], item.size, item.offset)
            grown = item.offset == 0 and os.fstat(opened[1]).st_size != item.size
        except OSError as error:
            raise UserError(f"source file '{item.path}' cannot be read: {error.strerror}") from None
        if len(data) != item.size or grown:
            raise UserError(f"source file '{item.path}' has changed since it was listed; start again")
        return data

    try:
        yield read
    finally:
        if opened is not None:
            os.close(opened[1])
