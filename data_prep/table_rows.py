"""The rows of a table, and which of its columns hold images and labels."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from data_prep.splits import SPLITS
from mimscale.data.names import one_line
from mimscale.errors import UserError

IMAGE_COLUMNS = ("path", "file", "file_name", "filename", "filepath", "image_path", "image", "jpg", "bytes")
LABEL_COLUMNS = ("label", "class", "cls")
SPLIT_COLUMNS = ("split", "subset", "set", "partition", "data set", "dataset")  # that may name the split of a row
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
    shown = _shown(columns)
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


class RowChoice:
    """Which rows of a table are taken: those whose value in one column matches a pattern, or all of one split.

    where: COLUMN=PATTERN, as in "split=train", upper and lower case alike; None = all rows. `of` is called for each
    file of the table, `finish` after the last one.
    """

    def __init__(self, table: Path, where: str | None) -> None:
        """Raises UserError."""
        self.table, self.where = table, where
        self.column, mark, pattern = (where or "").partition("=")
        self.pattern = _plain(pattern)
        if where is not None and not (self.column and mark):
            raise UserError(f"--where '{one_line(where)}' is not COLUMN=VALUE, as in --where split=train")
        self.left_out = 0
        self._taken = 0
        self._values: Counter[str] = Counter()  # of the column
        self._splits: defaultdict[str, Counter[str]] = defaultdict(Counter)  # column -> value -> rows

    def of(
        self, file: Path, columns: Sequence[str], used: Iterable[str | None], values: Callable[[str], list[str]]
    ) -> list[bool] | None:
        """Whether each row of a file is taken; None = all are. used: the columns of images and labels. values: those of
        a column. Raises UserError.
        """
        if self.where is None:
            for name in {*columns}.difference(used):
                if name.lower() in SPLIT_COLUMNS:
                    words = map(_plain, values(name))
                    self._splits[name].update(word for word in words if word in SPLITS)
            return None
        if self.column not in columns:
            raise UserError(
                f"table '{file}' has no column '{one_line(self.column)}' (it has {_shown(columns) or 'none'}); "
                "see --where"
            )
        found = values(self.column)
        self._values.update(found)
        taken = [fnmatchcase(_plain(value), self.pattern) for value in found]
        self._taken += sum(taken)
        self.left_out += len(taken) - sum(taken)
        return taken

    def finish(self) -> None:
        """Raises UserError if no row is taken, or rows of several splits are."""
        if self.where is not None and self.left_out and not self._taken:
            shown = ", ".join(f"'{one_line(value)[:60]}'" for value, _ in self._values.most_common(5))
            raise UserError(
                f"--where '{one_line(self.where)}' matches none of the {self.left_out:,} rows of '{self.table}'; "
                f"'{self.column}' holds {shown}{', ...' if len(self._values) > 5 else ''}"
            )
        for column, found in self._splits.items():
            if len({SPLITS[word] for word in found}) > 1:
                text = ", ".join(f"{count:,} of {word}" for word, count in found.items())
                choice = " or ".join(f"--where '{column}={word}'" for word in found)
                raise UserError(
                    f"'{self.table}' holds rows of several splits by its column '{column}' ({text}); choose one with "
                    f"{choice}, or take all with --where '{column}=*'"
                )


def _plain(value: str) -> str:
    """Splits are written in many ways: train, Train, " TRAIN"."""
    return value.strip().lower()


def _shown(columns: Sequence[str]) -> str:
    more = f" and {len(columns) - SHOWN_COLUMNS:,} more" if len(columns) > SHOWN_COLUMNS else ""
    return ", ".join(one_line(name)[:60] for name in columns[:SHOWN_COLUMNS]) + more
