"""The bytes of a source's pictures: whole files, places inside of archives, rows of parquet files."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from data_prep.plan import Item
from mimscale.errors import UserError

Read = Callable[[Item], bytes]
COLUMN = "::"  # between a parquet file and its column


@contextmanager
def reader() -> Iterator[Read]:
    """Gives a function item -> bytes that keeps the last file open: a big archive is opened once.

    The function raises UserError where a source cannot be read or has changed since it was listed.
    """
    opened: tuple[str, int] | None = None
    rows = _Rows()

    def read(item: Item) -> bytes:
        nonlocal opened
        if f".parquet{COLUMN}" in item.path:
            return rows.read(item)
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


class _Rows:
    """Rows of parquet files. Keeps every row group that it met: those of one shard."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[Any, list[int]]] = {}  # the file, and the first row of each group
        self._groups: dict[tuple[str, int], Any] = {}

    def read(self, item: Item) -> bytes:
        try:
            return self._read(item)
        except (OSError, IndexError, KeyError, parquet_library()[1].ArrowException) as error:
            raise UserError(f"source '{item.path}', row {item.offset}, cannot be read: {error}") from None

    def _read(self, item: Item) -> bytes:
        path, _, column = item.path.rpartition(COLUMN)
        if path not in self._files:
            file = parquet_library()[0].ParquetFile(path)
            lengths = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            self._files[path] = file, [sum(lengths[:group]) for group in range(len(lengths))]
        file, starts = self._files[path]
        group = bisect_right(starts, item.offset) - 1
        if (path, group) not in self._groups:
            self._groups[path, group] = file.read_row_group(group, columns=[column]).column(column)
        value = self._groups[path, group][item.offset - starts[group]].as_py()
        return (value.get("bytes") if isinstance(value, dict) else value) or b""


def parquet_library() -> tuple[Any, Any]:
    """(pyarrow.parquet, pyarrow). Raises UserError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet needs pyarrow, which is not installed; pip install 'mimscale[parquet]'") from None
    return pyarrow.parquet, pyarrow
