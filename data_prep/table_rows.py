"""The rows of a table, and which of its columns hold images and labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mimscale.data.names import one_line
from mimscale.errors import UserError

IMAGE_COLUMNS = ("path", "file", "file_name", "filename", "filepath", "image_path", "image", "jpg", "bytes")
LABEL_COLUMNS = ("label", "class", "cls")
SHOWN_COLUMNS = 12


class Row(NamedTuple):
    """The fields of Item; label is the number or name of the class, "" = none."""

    path: str
    label: str
    offset: int = 0
    size: int = -1
    column: str = ""


def choose_columns(table: Path, columns: Sequence[str], image: str | None, label: str | None) -> tuple[str, str | None]:
    """Names of the columns of images and of labels (None = unlabelled). Raises UserError."""
    chosen = image or next((name for name in IMAGE_COLUMNS if name in columns), None)
    shown = ", ".join(one_line(name)[:60] for name in columns[:SHOWN_COLUMNS])
    if len(columns) > SHOWN_COLUMNS:
        shown += f" and {len(columns) - SHOWN_COLUMNS:,} more"
    if chosen is None or chosen not in columns:
        raise UserError(
            f"table '{table}' has columns {shown}; name the one of the images with --image (its first line must name "
            "the columns)"
        )
    if label is not None and label != "none" and label not in columns:
        raise UserError(f"table '{table}' has columns {shown}, not '{label}'; see --label")
    found = label or next((name for name in LABEL_COLUMNS if name in columns), None)
    for name in (chosen, found):
        if columns.count(name) > 1 if isinstance(columns, list) else False:
            raise UserError(f"table '{table}' has {columns.count(name)} columns '{name}'; rename all but one")
    return chosen, None if found == "none" else found
