"""Tables in parquet files: images as bytes or as paths. Nothing but labels and paths is read to list the rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import compress, islice
from pathlib import Path
from typing import Any

from data_prep.item_reader import parquet_library
from data_prep.splits import chosen_files
from data_prep.table_rows import Row, RowChoice, choose_columns
from data_prep.walk import files_below
from mimscale.errors import UserError
from mimscale.files.progress import no_progress

Rows = tuple[list[Row], list[int] | None, list[str] | None]


def read_parquet(
    table: Path,
    root: Path,
    image: str | None,
    label: str | None,
    pattern: str | None,
    choice: RowChoice,
    skipped: Counter[str],
    done: Callable[[int], None] = no_progress,
) -> Rows:
    """(rows, lengths of the row groups, names of the classes). The lengths are None if the files hold paths instead of
    images; the names are None unless Hugging Face's metadata gives them. skipped: gets the files that are passed over.
    Raises UserError.
    """
    pq, pa = parquet_library()
    files = chosen_files(table, _files_below(table, skipped), pattern) if table.is_dir() else [table]
    if not files:
        raise UserError(f"table '{table}': the folder holds no .parquet files")
    rows: list[Row] = []
    runs: list[int] = []
    stored: set[bool] = set()
    names: list[list[str] | None] = []
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                column, label_column = choose_columns(path, list(file.schema_arrow.names), image, label)
                names.append(_class_names(file.schema_arrow, label_column))
                chosen = choice.of(path, file.schema_arrow.names, (column, label_column), partial(_column, file))
                taken = None if chosen is None else iter(chosen)
                kind = _checked(path, file.schema_arrow, column, label_column)
                as_bytes = kind == "bytes" or (kind == "struct" and _stores_bytes(file, column))
                stored.add(as_bytes)
                for group_rows in _groups(path, file, column, label_column, kind, as_bytes):
                    done(len(group_rows))
                    if taken is not None:
                        group_rows = list(compress(group_rows, islice(taken, len(group_rows))))
                    rows += group_rows
                    runs += [len(group_rows)] if group_rows else []
        except (OSError, pa.ArrowException) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"table '{path}' cannot be read: {reason[:200]}") from None
    if len(stored) > 1:
        raise UserError(f"'{table}': some files hold images and others paths; convert them one by one, see --files")
    if any(found != names[0] for found in names):
        raise UserError(f"'{table}': its files name different classes; convert them one by one, see --files")
    return rows, runs if True in stored else None, names[0]


def _files_below(folder: Path, skipped: Counter[str]) -> list[Path]:
    return sorted(folder / name for name in files_below(folder, skipped) if name.lower().endswith(".parquet"))


def _checked(path: Path, schema: Any, column: str, label: str | None) -> str:
    """ "struct", "bytes" or "paths", what the column of images holds. Raises UserError; a type is named by its kind."""
    types = parquet_library()[1].types
    kind = schema.field(column).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if label is not None:
        label_type = schema.field(label).type
        if types.is_nested(label_type) or types.is_temporal(label_type):
            raise UserError(
                f"table '{path}': column '{label}' holds {_kind(label_type)}, not class labels; see --label"
            )
    if types.is_struct(kind):
        fields = {kind.field(number).name for number in range(kind.num_fields)}
        if "bytes" in fields or "path" in fields:
            return "struct"
    elif str(kind).startswith(("binary", "large_binary", "fixed_size_binary")):  # or one of them as a view
        return "bytes"
    elif str(kind).startswith(("string", "large_string")):
        return "paths"
    raise UserError(
        f"table '{path}': column '{column}' holds {_kind(kind)}, not one image (bytes, or bytes and path) or path per "
        "row; see --image"
    )


def _kind(kind: Any) -> str:
    return str(kind).split("<")[0].split("[")[0]


def _stores_bytes(file: Any, column: str) -> bool:
    """Whether any row of a struct has bytes, by the statistics of the groups; without them, it is assumed."""
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        for index in range(group.num_columns):
            chunk = group.column(index)
            if chunk.path_in_schema == f"{column}.bytes":
                statistics = chunk.statistics
                known = statistics is not None and statistics.has_null_count
                if not known or statistics.null_count < group.num_rows:
                    return True
    return False


def _groups(path: Path, file: Any, column: str, label: str | None, kind: str, as_bytes: bool) -> Iterator[list[Row]]:
    first = 0
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        total = group.num_rows
        source = f"{column}.path" if kind == "struct" else column
        names = [name for name in (None if as_bytes else source, label) if name]
        columns = file.read_row_group(number, columns=names) if names else {}
        labels = [value or "" for value in _texts(columns[label])] if label else [""] * total
        if as_bytes:
            size = max(1, _column_bytes(group, column) // max(1, total))
            yield [Row(str(path), name, first + row, size, column) for row, name in enumerate(labels)]
        else:
            paths = _texts(columns[column])
            empty = sum(not value for value in paths)
            if empty:
                raise UserError(
                    f"table '{path}': {empty:,} of {total:,} rows "
                    f"have neither image nor path in '{column}'; remove them"
                )
            yield [Row(value or "", name) for value, name in zip(paths, labels, strict=True)]
        first += total


def _texts(column: Any) -> list[str | None]:
    """The values, or those of a struct's only field, as text; bytes that are not UTF-8 as in names of files."""
    pa = parquet_library()[1]
    if pa.types.is_struct(column.type):
        (column,) = column.flatten()
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if str(kind) in ("string", "large_string", "string_view"):
        column = column.cast(pa.large_binary())
    return [_text(value) for value in column.to_pylist()]


def _column(file: Any, name: str) -> list[str]:
    column = file.read(columns=[name])[name]
    nested = parquet_library()[1].types.is_nested(column.type)
    return [value or "" for value in (map(str, column.to_pylist()) if nested else _texts(column))]


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    return None if value is None else str(value)


def _column_bytes(group: Any, column: str) -> int:
    chunks = (group.column(number) for number in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if f"{chunk.path_in_schema}.".startswith(f"{column}."))


def _class_names(schema: Any, label: str | None) -> list[str] | None:
    """The names of ClassLabel in the metadata that Hugging Face's datasets write, in the order of the class index."""
    with suppress(KeyError, TypeError, ValueError, AttributeError):
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]
        names = feature["names"] if feature.get("_type") == "ClassLabel" else None
        if isinstance(names, dict):  # of older versions: {"0": name}
            names = [names[str(number)] for number in range(len(names))]
        if names and all(isinstance(name, str) for name in names):
            return list(names)
    return None
