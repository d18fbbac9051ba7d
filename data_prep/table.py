"""Source: a list of images: text (a path per line), CSV or TSV with a column of paths, parquet with paths or bytes."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, compress, pairwise
from pathlib import Path

from data_prep.folder import PROBE_THREADS, try_probe
from data_prep.labels import classes_of, label_value
from data_prep.plan import Item, Source, unique_keys
from data_prep.reports import SHOWN
from data_prep.table_parquet import read_parquet
from data_prep.table_rows import Row, RowChoice
from data_prep.table_text import read_csv, read_lines
from mimscale.data.names import one_line
from mimscale.errors import UserError
from mimscale.files.progress import no_progress

LONGEST_PATH = 4096
BASE64 = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD", "data:image/")  # how JPEG, PNG, WebP and GIF begin


@dataclass(frozen=True)
class TableOptions:
    """image, label: names of the columns; by default the first of IMAGE_COLUMNS and of LABEL_COLUMNS that exists. label
    "none" = unlabelled. classes: their names in the order of the class index. skip_unlabelled, skip_missing: leave out
    rows without a label, or whose file cannot be read, which are refused by default. files: pattern of the names of
    parquet files. where: COLUMN=PATTERN of the rows that are taken. delimiter: of a CSV file, found by default.
    """

    image: str | None = None
    label: str | None = None
    classes: list[str] | None = None
    skip_unlabelled: bool = False
    skip_missing: bool = False
    files: str | None = None
    where: str | None = None
    delimiter: str | None = None


def read_table(
    table: Path,
    root: Path | None = None,
    options: TableOptions | None = None,
    done: Callable[[int], None] = no_progress,
) -> Source:
    """table: a file, or a folder of parquet files. root: folder of relative paths (default: the folder of the table).
    done: gets the number of rows that were read.

    If all labels are whole numbers, these are the class indices; otherwise the classes are the sorted names, or those
    that `options.classes` or the metadata of a Hugging Face data set give (see `label_value`). Images inside parquet
    files are shuffled by row groups and inside each shard, so that every group is read about once. Raises UserError.
    """
    options = options or TableOptions()
    if not table.exists():
        raise UserError(f"table '{table}': no such file")
    kind = "parquet" if table.is_dir() else table.suffix.lower().lstrip(".")
    root = (table if table.is_dir() else table.parent) if root is None else root
    runs: list[int] | None = None
    names: list[str] | None = None
    skipped: Counter[str] = Counter()
    left_out: dict[str, str] = {}
    choice = RowChoice(table, options.where)
    if kind == "parquet":
        rows, runs, names = read_parquet(
            table, root, options.image, options.label, options.files, choice, skipped, done
        )
    elif kind in ("csv", "tsv"):
        rows = read_csv(table, options.image, options.label, choice, options.delimiter)
    elif kind in ("txt", "lst", "list"):
        rows = read_lines(table)
        choice.of(table, [], (), lambda name: [])
    else:
        raise UserError(
            f"table '{table}': its name must end in .txt, .csv, .tsv or .parquet (or be a folder of .parquet)"
        )
    choice.finish()
    skipped["other rows than --where takes"] += choice.left_out
    if runs is None:
        rows = _files(table, rows, root, skipped, left_out, options.skip_missing, done)
    known = options.classes or names
    rows, runs = _labelled_rows(table, rows, runs, options.skip_unlabelled, skipped, known or ())
    values = {row.label for row in rows}
    labelled = bool(values) and values != {""}
    where = f"table '{table}', {len(rows):,} rows"
    classes, label_of = classes_of(values, where, known) if labelled else (None, {})
    if runs is None:
        _report_repeated(table, rows)
    keys = unique_keys(_file_names(rows) if runs is None else _row_names(rows))
    items = [
        Item(key, label_of.get(row.label, -1), row.path, row.offset, row.size, row.column)
        for key, row in zip(keys, rows, strict=True)
    ]
    return Source({"kind": "table", "path": str(table)}, items, classes, +skipped, left_out, runs, str(root))


def _file_names(rows: list[Row]) -> list[str]:
    """The paths without extension and without their common parent folder."""
    names = [os.path.splitext(row.path)[0] for row in rows]
    folder = os.path.dirname(os.path.commonprefix([name + "/" for name in names]))
    return [name[len(folder) :].lstrip("/") or os.path.basename(name) for name in names]


def _row_names(rows: list[Row]) -> list[str]:
    return [f"{Path(row.path).stem}/{row.offset:09d}" for row in rows]


def _files(
    table: Path,
    rows: list[Row],
    root: Path,
    skipped: Counter[str],
    left_out: dict[str, str],
    skip_missing: bool,
    done: Callable[[int], None],
) -> list[Row]:
    paths = [root / row.path for row in rows]
    with ThreadPoolExecutor(PROBE_THREADS) as pool:
        probed = []
        for state in pool.map(try_probe, paths):
            probed.append(state)
            done(1)
    missing = [(row.path, found) for row, found in zip(rows, probed, strict=True) if isinstance(found, str)]
    if missing and not skip_missing:
        _refuse_missing(table, missing, len(rows))
    kept = []
    for row, path, found in zip(rows, paths, probed, strict=True):
        if not isinstance(found, str) and found[0]:
            kept.append(Row(str(path), row.label, 0, found[1]))
        else:
            left_out[row.path] = f"files that cannot be read ({found})" if isinstance(found, str) else found[2]
            skipped[left_out[row.path]] += 1
    return kept


def _report_repeated(table: Path, rows: Sequence[Row]) -> None:
    """A file that is listed twice is kept, and said; it would be trained on twice, perhaps as two classes."""
    labels: dict[str, set[str]] = {}
    for row in rows:
        labels.setdefault(row.path, set()).add(row.label)
    if len(labels) < len(rows):
        differ = sum(len(found) > 1 for found in labels.values())
        more = f", {differ:,} of them with different labels" if differ else ""
        print(f"'{table}': {len(rows) - len(labels):,} rows name a file again, and are kept{more}", file=sys.stderr)


def _shortened(name: str) -> str:
    """No path is as long as a text that stands in its place."""
    return name if len(name) <= LONGEST_PATH else f"{name[:60]}... ({len(name):,} characters)"


def _refuse_missing(table: Path, missing: Sequence[tuple[str, str]], total: int) -> None:
    shown = ", ".join(f"'{_shortened(one_line(path))}'" for path, _ in missing[:SHOWN])
    more = ", ..." if len(missing) > SHOWN else ""
    reasons = ", ".join(sorted({reason for _, reason in missing})[:3])
    fix = "give their folder with --root, or leave them out with --skip-missing"
    if all("://" in path for path, _ in missing):
        fix = "addresses are not downloaded; do that first, for example with img2dataset"
    elif all(path.startswith(BASE64) for path, _ in missing):
        fix = "the column holds images as base64 text; store their bytes in parquet"
    raise UserError(
        f"table '{table}': {len(missing):,} of {total:,} files cannot be read ({reasons}): {shown}{more}; {fix}"
    )


def _labelled_rows(
    table: Path, rows: list[Row], runs: list[int] | None, skip: bool, skipped: Counter[str], known: Sequence[str]
) -> tuple[list[Row], list[int] | None]:
    """The rows with a label, all if none has one; others are refused, or with `skip` counted. Raises UserError."""
    if all(row.label == "" for row in rows):
        return rows, runs
    kept = [label_value(row.label, known) is not None for row in rows]
    missing = len(rows) - sum(kept)
    if missing and not skip:
        raise UserError(
            f"table '{table}': {missing:,} of {len(rows):,} rows have no label (empty, NaN, None or -1); complete "
            "them, leave them out with --skip-unlabelled, or give --label none"
        )
    if missing:
        skipped["without a label"] += missing
    if runs is not None:
        ends = [0, *accumulate(runs)]
        runs = [total for first, end in pairwise(ends) if (total := sum(kept[first:end]))]
    return list(compress(rows, kept)), runs
