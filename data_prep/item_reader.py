"""Reads the encoded images of a source: from files, members of archives or rows of parquet files."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from data_prep.plan import Item
from mimscale.errors import UserError

Read = Callable[[Item], bytes]
COLUMN = "::"  # separates the path of a parquet file from the name of the column


@contextmanager
def open_reader() -> Iterator[Read]:
    """A function item -> bytes that keeps the last file open, so that a large archive is current once.

    The function raises UserError if a source cannot be read or has changed since it was listed.
    """
    current: tuple[str, int] | None = None
    rows = _ParquetReader()

    def read(item: Item) -> bytes:
        nonlocal current
        if f".parquet{COLUMN}" in item.path:
            return rows.read(item)
        try:
            if current is None or current[0] != item.path:
                if current is not None:
                    os.close(current[1])
                    current = None
                current = item.path, os.open(item.path, os.O_RDONLY)
            data = os.pread(current[1], item.size, item.offset)
            grown = item.offset == 0 and os.fstat(current[1]).st_size != item.size
        except OSError as error:
            raise UserError(f"source file '{item.path}' cannot be read: {error.strerror}") from None
        if len(data) != item.size or grown:
            raise UserError(f"source file '{item.path}' has changed since it was listed; start again")
        return data

    try:
        yield read
    finally:
        if current is not None:
            os.close(current[1])


class _ParquetReader:
    """Reads rows of parquet files. Keeps every row group that it has read, which are those of one shard."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[Any, list[int]]] = {}  # (file, first row of each group)
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
