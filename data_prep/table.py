"""Source: a list of images: text (one path per line), CSV with a column of paths, parquet with paths or bytes."""

from __future__ import annotations

import csv
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, compress, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.folder import PROBE_THREADS, probe
from data_prep.item_reader import COLUMN, parquet_library
from data_prep.labels import classes_of, label_value
from data_prep.plan import Item, Source, unique_keys
from data_prep.splits import chosen_files
from mimscale.errors import UserError

IMAGE_COLUMNS = ("path", "file", "file_name", "image", "jpg", "bytes")
LABEL_COLUMNS = ("label", "class", "cls")


class Row(NamedTuple):
    """The fields of Item; label is the name of the class, "" = none."""

    path: str
    label: str
    offset: int = 0
    size: int = -1


def read_table(
    table: Path,
    root: Path | None,
    image: str | None,
    label: str | None,
    *,
    skip_unlabelled: bool = False,
    files: str | None = None,
) -> Source:
    """table: a file, or a folder of parquet files, of which `files` is a pattern of names. root: folder of relative
    paths (default: the folder of the table).

    image, label: names of the columns; by default the first of IMAGE_COLUMNS and of LABEL_COLUMNS that exists. label
    "none" = unlabelled. If all labels are whole numbers, these are the class indices; otherwise the classes are the
    sorted names (see `label_value`). skip_unlabelled: leave out rows without a label, which are refused by default.
    Images inside parquet files are shuffled by row groups and inside each shard, so that every group is
    read about once. Raises UserError.
    """
    if not table.exists():
        raise UserError(f"table '{table}': no such file")
    kind = "parquet" if table.is_dir() else table.suffix.lower().lstrip(".")
    runs: list[int] | None = None
    if kind == "parquet":
        rows, runs = _parquet(table, image, label, files)
    elif kind == "csv":
        rows = _csv(table, image, label)
    elif kind in ("txt", "lst", "list"):
        rows = [Row(line.strip(), "") for line in _text(table).splitlines() if line.strip()]
    else:
        raise UserError(f"table '{table}': its name must end in .txt, .csv or .parquet (or be a folder of .parquet)")
    skipped: Counter[str] = Counter()
    if runs is None:
        rows = _files(rows, table.parent if root is None else root, skipped)
    rows, runs = _labelled_rows(table, rows, runs, skip_unlabelled, skipped)
    names = {row.label for row in rows}
    labelled = bool(names) and names != {""}
    classes, label_of = classes_of(names, f"table '{table}', {len(rows):,} rows") if labelled else (None, {})
    keys = unique_keys(_file_names(rows) if runs is None else _row_names(rows))
    items = [
        Item(key, label_of.get(row.label, -1), row.path, row.offset, row.size)
        for key, row in zip(keys, rows, strict=True)
    ]
    return Source({"kind": "table", "path": str(table)}, items, classes, skipped, runs)


def _file_names(rows: list[Row]) -> list[str]:
    """The paths without extension and without their common parent folder."""
    names = [os.path.splitext(row.path)[0] for row in rows]
    folder = os.path.dirname(os.path.commonprefix([name + "/" for name in names]))
    return [name[len(folder) :].lstrip("/") or os.path.basename(name) for name in names]


def _row_names(rows: list[Row]) -> list[str]:
    return [f"{Path(row.path.split(COLUMN)[0]).stem}/{row.offset:09d}" for row in rows]


def _files(rows: list[Row], root: Path, skipped: Counter[str]) -> list[Row]:
    paths = [root / row.path for row in rows]
    with ThreadPoolExecutor(PROBE_THREADS) as pool:
        probed = list(pool.map(probe, paths))
    kept = []
    for row, path, (is_image, size) in zip(rows, paths, probed, strict=True):
        if is_image:
            kept.append(Row(str(path), row.label, 0, size))
        else:
            skipped["without an image's content"] += 1
    return kept


def _labelled_rows(
    table: Path, rows: list[Row], runs: list[int] | None, skip: bool, skipped: Counter[str]
) -> tuple[list[Row], list[int] | None]:
    """The rows with a label, all if none has one; others are refused, or with `skip` counted. Raises UserError."""
    if all(row.label == "" for row in rows):
        return rows, runs
    kept = [label_value(row.label) is not None for row in rows]
    missing = len(rows) - sum(kept)
    if missing and not skip:
        raise UserError(
            f"table '{table}': {missing:,} of {len(rows):,} rows have no label (empty, NaN or -1); complete them, "
            "leave them out with --skip-unlabelled, or give --label none"
        )
    if missing:
        skipped["without a label"] += missing
    if runs is not None:
        ends = [0, *accumulate(runs)]
        runs = [total for first, end in pairwise(ends) if (total := sum(kept[first:end]))]
    return list(compress(rows, kept)), runs


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"table '{path}' cannot be read: {error}") from None


def _csv(table: Path, image: str | None, label: str | None) -> list[Row]:
    reader = csv.DictReader(_text(table).splitlines())
    path, label = _columns(table, list(reader.fieldnames or []), image, label)
    rows = [Row(row[path] or "", (row[label] or "") if label else "") for row in reader]
    if any(not row.path for row in rows):
        raise UserError(f"table '{table}': some rows have no {path}; complete or remove them")
    return rows


def _columns(table: Path, columns: list[str], image: str | None, label: str | None) -> tuple[str, str | None]:
    """Names of the columns of images and of labels (None = unlabelled). Raises UserError."""
    chosen = image or next((name for name in IMAGE_COLUMNS if name in columns), None)
    if chosen is None or chosen not in columns:
        raise UserError(f"table '{table}' has columns {', '.join(columns)}; name the one of the images with --image")
    if label is not None and label != "none" and label not in columns:
        raise UserError(f"table '{table}' has columns {', '.join(columns)}, not '{label}'; see --label")
    found = label or next((name for name in LABEL_COLUMNS if name in columns), None)
    return chosen, None if found == "none" else found


def _parquet(
    table: Path, image: str | None, label: str | None, pattern: str | None
) -> tuple[list[Row], list[int] | None]:
    """(rows, lengths of the row groups); the lengths are None if the files hold paths instead of images."""
    pq, pa = parquet_library()
    files = [table]
    if table.is_dir():
        files = chosen_files(table, sorted(p for p in table.glob("*.parquet") if p.name[0] != "."), pattern)
    if not files:
        raise UserError(f"table '{table}': the folder holds no .parquet files")
    rows: list[Row] = []
    runs: list[int] = []
    for path in files:
        try:
            file = pq.ParquetFile(path)
            column, label_column = _columns(path, file.schema_arrow.names, image, label)
            kind = file.schema_arrow.field(column).type
            holds_images = pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
            first = 0
            for group in range(file.num_row_groups):
                total = file.metadata.row_group(group).num_rows
                names = [name for name in (None if holds_images else column, label_column) if name]
                columns = file.read_row_group(group, columns=names).to_pydict() if names else {}
                labels = (
                    ["" if value is None else str(value) for value in columns[label_column]]
                    if label_column
                    else [""] * total
                )
                if holds_images:
                    size = max(1, _column_bytes(file.metadata.row_group(group), column) // max(1, total))
                    rows += [Row(f"{path}{COLUMN}{column}", name, first + row, size) for row, name in enumerate(labels)]
                    runs += [total] if total else []
                else:
                    rows += [Row(str(value), name) for value, name in zip(columns[column], labels, strict=True)]
                first += total
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"table '{path}' cannot be read: {str(error).splitlines()[0]}") from None
    return rows, runs if runs else None


def _column_bytes(group: Any, column: str) -> int:
    chunks = (group.column(number) for number in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
