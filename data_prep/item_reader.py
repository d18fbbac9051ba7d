"""Reads the encoded images of a source: from files, members of archives, rows of parquet files or of pixels."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from data_prep import png_rows
from data_prep.plan import Item
from mimscale.data.decode import BadImage
from mimscale.errors import UserError

Read = Callable[[Item], bytes]
BATCH_BYTES = 8 << 20  # of images that are taken from parquet pages at a time
BUFFER = 1 << 20  # bytes of a file that are read at a time
OPEN_GROUPS = 2  # row groups that the next shards continue


class ItemReader:
    """Keeps the last file open, so that a large archive is current once, and the row groups that are not read to their
    end, so that shards that are written one after the other read each group once.

    root: folder of the relative paths in parquet files.
    """

    def __init__(self, root: str = "") -> None:
        self._current: tuple[str, int] | None = None
        self._rows = _ParquetRows()
        self._root = root

    @contextmanager
    def shard(self, items: Sequence[Item]) -> Iterator[Read]:
        """A function item -> bytes for the items of a shard. It raises UserError if a source cannot be read or has
        changed since it was listed, and BadImage for a row without an image.
        """
        rows = self._rows.read([i for i in items if i.column and not i.column.startswith(png_rows.PREFIX)])

        def read(item: Item) -> bytes:
            if item.column.startswith(png_rows.PREFIX):
                return png_rows.png(item)
            return self._row(rows.pop((item.path, item.offset)), item) if item.column else self._file(item)

        yield read

    def close(self) -> None:
        if self._current is not None:
            os.close(self._current[1])
            self._current = None
        self._rows.close()

    def _file(self, item: Item) -> bytes:
        try:
            if self._current is None or self._current[0] != item.path:
                if self._current is not None:
                    os.close(self._current[1])
                    self._current = None
                self._current = item.path, os.open(item.path, os.O_RDONLY)
            data = os.pread(self._current[1], item.size, item.offset)
            grown = item.offset == 0 and os.fstat(self._current[1]).st_size != item.size
        except OSError as error:
            raise UserError(f"source file '{item.path}' cannot be read: {error.strerror}") from None
        if len(data) != item.size or grown:
            raise UserError(f"source file '{item.path}' has changed since it was listed; start again")
        return data

    def _row(self, value: Any, item: Item) -> bytes:
        data = value.get("bytes") if isinstance(value, dict) else value
        if data:
            return data
        path = value.get("path") if isinstance(value, dict) else None
        if not path:
            raise BadImage("not an image: it is empty")
        try:
            return (Path(self._root) / path).read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error  # without the name, so that reasons can be counted
            raise BadImage(f"no bytes, and the file of its path cannot be read: {reason}") from None


class _ParquetRows:
    """Reads the rows of a shard in the order of the file, page by page; memory holds the rows of the shard and one
    batch. A group that the shard does not read to its end stays open at that row.
    """

    def __init__(self) -> None:
        self._files: dict[str, tuple[Any, list[int]]] = {}  # (file, first row of each group and the end)
        self._open: dict[tuple[str, int, str], _GroupRows] = {}

    def read(self, items: Sequence[Item]) -> dict[tuple[str, int], Any]:
        """(path, row) -> value. Raises UserError."""
        wanted: dict[tuple[str, int, str], list[Item]] = {}
        values: dict[tuple[str, int], Any] = {}
        for item in sorted(items, key=lambda item: (item.path, item.offset)):
            try:
                starts = self._file(item.path)[1]
            except (OSError, parquet_library()[1].ArrowException) as error:
                raise UserError(f"source '{item.path}' cannot be read: {str(error)[:200]}") from None
            group = bisect_right(starts, item.offset) - 1
            wanted.setdefault((item.path, group, item.column), []).append(item)
        for key, rows in wanted.items():
            try:
                self._read_group(key, rows, values)
            except (OSError, IndexError, KeyError, StopIteration, parquet_library()[1].ArrowException) as error:
                where = f"source '{key[0]}', rows from {rows[0].offset:,}"
                raise UserError(f"{where}, cannot be read: {str(error)[:200]}") from None
        return values

    def close(self) -> None:
        self._open.clear()
        for file, _ in self._files.values():
            file.close()
        self._files.clear()

    def _read_group(self, key: tuple[str, int, str], items: list[Item], values: dict[tuple[str, int], Any]) -> None:
        path, group, column = key
        file, starts = self._file(path)
        rows = self._open.pop(key, None)
        if rows is None or rows.first > items[0].offset:
            batches = file.iter_batches(
                max(1, BATCH_BYTES // items[0].size), row_groups=[group], columns=[column], use_threads=False
            )
            rows = _GroupRows(batches, starts[group])
        for item in items:
            values[path, item.offset] = rows.value(item.offset)
        if items[-1].offset + 1 < starts[group + 1]:
            self._open[key] = rows
            while len(self._open) > OPEN_GROUPS:
                del self._open[next(iter(self._open))]

    def _file(self, path: str) -> tuple[Any, list[int]]:
        if path not in self._files:
            file = parquet_library()[0].ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)
            lengths = (file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
            self._files[path] = file, list(accumulate(lengths, initial=0))
        return self._files[path]


class _GroupRows:
    """The rows of one group from the row `first` on. batches: record batches of one column, in order."""

    def __init__(self, batches: Iterator[Any], first: int):
        self._batches, self.first, self._batch = batches, first, None

    def value(self, row: int) -> Any:
        """Of a row that is not before the last one that was asked for. Raises StopIteration at the end of the group."""
        while self._batch is None or row >= self.first + self._batch.num_rows:
            self.first += 0 if self._batch is None else self._batch.num_rows
            self._batch = None  # before the next one is made
            self._batch = next(self._batches)
        return _image(self._batch.column(0)[row - self.first])


def _image(value: Any) -> Any:
    """Bytes, or a dict of bytes and path; a path that is not UTF-8 becomes what Python has for names of files."""
    try:
        return value.as_py()
    except UnicodeDecodeError:
        path = value["path"].as_buffer().to_pybytes().decode(errors="surrogateescape")
        return {"bytes": value["bytes"].as_py() if "bytes" in value else None, "path": path}


def parquet_library() -> tuple[Any, Any]:
    """(pyarrow.parquet, pyarrow). Raises UserError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet needs pyarrow, which is not installed; pip install -e '.[parquet]'") from None
    return pyarrow.parquet, pyarrow
