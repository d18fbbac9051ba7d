"""Tables as text: lists of paths, CSV, TSV. Only line feeds end a line; names that are not UTF-8 stay what they are."""

from __future__ import annotations

import csv
import io
import re
import sys
from itertools import compress
from pathlib import Path

from data_prep.table_rows import IMAGE_COLUMNS, Row, RowChoice, choose_columns
from mimscale.data.names import one_line
from mimscale.data.packed import compression, unpack
from mimscale.errors import UserError

DELIMITERS = (",", "\t", ";", "|")


def read_lines(table: Path) -> list[Row]:
    """One path per line. Raises UserError."""
    lines = (line.removesuffix("\r") for line in _text(table).split("\n"))
    return [Row(line, "") for line in lines if line.strip()]


def read_csv(
    table: Path, image: str | None, label: str | None, choice: RowChoice, delimiter: str | None = None
) -> list[Row]:
    """The first line names the columns. delimiter: None = the one that gives the columns. Raises UserError."""
    text = _text(table)
    if excel := re.match(r"sep=(.)\r?\n", text):  # Excel's own first line
        text, delimiter = text[excel.end() :], delimiter or excel[1]
    lines = _parsed(table, text, delimiter or _delimiter(table, text, image))
    if not lines:
        raise UserError(f"table '{table}' is empty; its first line names the columns")
    columns = [name.strip() for name in lines[0]]
    path, label = choose_columns(table, columns, image, label)
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(columns):
            raise UserError(
                f"table '{table}', row {number:,}: {len(line):,} fields, but {len(columns):,} columns; correct it, or "
                "give the --delimiter"
            )
    body = lines[1:]
    taken = choice.of(table, columns, (path, label), lambda name: [line[columns.index(name)] for line in body])
    body = body if taken is None else list(compress(body, taken))
    at, label_at = columns.index(path), columns.index(label) if label else -1
    rows = [Row(line[at], line[label_at] if label else "") for line in body]
    empty = sum(not row.path for row in rows)
    if empty:
        raise UserError(f"table '{table}': {empty:,} of {len(rows):,} rows have no {path}; complete or remove them")
    return rows


def _text(path: Path) -> str:
    """Bytes that are not UTF-8 become surrogates, as in names of files. A byte order mark decides the encoding."""
    try:
        data = path.read_bytes()
        if (packed := compression(data[:8])) is not None:
            raise UserError(f"table '{path}' is compressed ({packed}); {unpack(path, packed)}")
        if b"\0" in data[:2] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"table '{path}' is no text in UTF-8: a byte of its first line is zero; save it as UTF-8")
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            text = data.decode("utf-16")
        else:
            text = data.decode("utf-8-sig", "surrogateescape")
        return text if "\n" in text else text.replace("\r", "\n")  # as old programs of the Mac end their lines
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"table '{path}' cannot be read: {error}") from None


def _delimiter(table: Path, text: str, image: str | None) -> str:
    """The one with which the first line has a column of images; else the one that gives most columns."""
    first = text.split("\n", 1)[0].rstrip("\r")
    wanted = {image} if image else set(IMAGE_COLUMNS)
    order = ("\t", *DELIMITERS) if table.suffix.lower() == ".tsv" else DELIMITERS
    headers = {mark: [name.strip().strip('"') for name in first.split(mark)] for mark in order}
    found = [mark for mark, names in headers.items() if wanted & set(names)]
    return max(found or headers, key=lambda mark: (len(headers[mark]) > 1, len(headers[mark])))


def _parsed(table: Path, text: str, delimiter: str) -> list[list[str]]:
    """The fields of all lines that are not empty. Tabs seldom come with quotes, and then a quote is a character."""
    if delimiter == "\t":
        plain = [line.removesuffix("\r").split("\t") for line in text.split("\n")]
        plain = [line for line in plain if line != [""]]
        if len({len(line) for line in plain}) <= 1:
            return [[_unquoted(field) for field in line] for line in plain]
    csv.field_size_limit(sys.maxsize)  # the limit is one for the whole process
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    lines: list[list[str]] = []
    try:
        lines += (line for line in reader if line)
    except csv.Error as error:
        where = f"table '{table}', line {reader.line_num:,}"
        raise UserError(f"{where}, is not a row of CSV: {one_line(str(error))}; correct its quotes") from None
    return lines


def _unquoted(field: str) -> str:
    quoted = len(field) > 1 and field[0] == field[-1] == '"'
    return field[1:-1].replace('""', '"') if quoted else field
