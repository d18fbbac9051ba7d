"""One input is one set: files or folders of several splits (train, validation, test) are not merged."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

from mimscale.errors import UserError

SPLITS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation", "holdout"), "validation"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
    **dict.fromkeys(("unlabeled", "unlabelled"), "unlabelled"),
    "extra": "extra",
}
_WORD = re.compile(r"[A-Z]*[a-z]+|[A-Z]+")  # imageTrain-00 -> image, Train; trainA -> train, A; TEST -> TEST


def chosen_files(folder: Path, paths: Sequence[Path], pattern: str | None) -> list[Path]:
    """The files whose names match the pattern; None = all. Raises UserError if there are none, or several splits.

    A pattern is compared with the name and with the path below `folder`. The split stands in the name (train-0.tar), or
    else in that of the nearest folder that has one (train/0.parquet).
    """
    below = {path: str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path) for path in paths}
    if pattern is not None:
        kept = set(_matching(folder, list(below.values()), pattern))
        return [path for path in paths if below[path] in kept]
    _refuse_several(folder, *_splits(below.values()))
    return list(paths)


def chosen_images(folder: Path, names: Sequence[str], pattern: str | None, labelled: bool) -> list[str]:
    """As `chosen_files`, of images by their paths below `folder`. Any image may be called test.jpg, so they are of
    several splits only if most names say so: of all together, or with labels of any class folder.
    """
    if pattern is not None:
        return _matching(folder, names, pattern)
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        top, _, rest = name.partition(os.sep) if labelled else ("", "", name)
        groups[top].append(rest)
    for members in groups.values():
        found, patterns = _splits(members)
        if 2 * found.total() > len(members):
            inside = {split: f"*/{one}" if labelled and "/" in one else one for split, one in patterns.items()}
            _refuse_several(folder, found, inside)
    return list(names)


def _matching(folder: Path, names: Sequence[str], pattern: str) -> list[str]:
    kept = [name for name in names if fnmatchcase(os.path.basename(name), pattern) or fnmatchcase(name, pattern)]
    if names and not kept:
        raise UserError(f"--files '{pattern}' matches none of the {len(names):,} files of '{folder}'")
    return kept


def _splits(names: Iterable[str]) -> tuple[Counter[str], dict[str, str]]:
    """(number of files of each split, a pattern for each)."""
    found: Counter[str] = Counter()
    patterns: dict[str, str] = {}
    for name in names:
        split, choice = _split_of(name)
        if split:
            found[split] += 1
            patterns.setdefault(split, choice)
    return found, patterns


def _refuse_several(folder: Path, found: Counter[str], patterns: dict[str, str]) -> None:
    """Raises UserError."""
    if len(found) > 1:
        text = ", ".join(f"{count:,} of {split}" for split, count in found.items())
        choice = " or ".join(f"--files '{pattern}'" for pattern in patterns.values())
        raise UserError(f"'{folder}' holds files of several splits ({text}); choose one with {choice}")


def check_classes(root: Path, names: Sequence[str]) -> None:
    """Raises UserError if the class folders of `root` are those of splits: train and val, or train2017 and val2017.

    One class may be called train, and others bullet train and test tube.
    """
    splits = [name for name in names if name.lower() in SPLITS]
    alike: defaultdict[str, dict[str, str]] = defaultdict(dict)  # a name without its split -> split -> name
    for name in names:
        word = _split_word(name)
        if word:
            alike[f"{name[: word.start()]}*{name[word.end() :]}"].setdefault(SPLITS[word[0].lower()], name)
    several = [list(found.values()) for found in alike.values() if len(found) > 1]
    if not several and splits and len(splits) == len(names):
        several = [splits]
    if several:
        train = [name for name in several[0] if (word := _split_word(name)) and SPLITS[word[0].lower()] == "train"]
        raise UserError(
            f"'{root}' is the root of a data set: {', '.join(several[0])} are splits, not classes; "
            f"give '{root / (train or several[0])[0]}', and each split its own destination"
        )


@lru_cache(maxsize=1 << 16)  # of folders above all
def _split_word(name: str) -> re.Match[str] | None:
    return next((word for word in _WORD.finditer(name) if word[0].lower() in SPLITS), None)


def _split_of(path: str) -> tuple[str, str]:
    """(split, pattern of its files) of a path; ("", "") if it names none."""
    parts = path.split(os.sep)
    word = _split_word(os.path.splitext(parts[-1])[0])
    if word:
        return SPLITS[word[0].lower()], f"{parts[-1][: word.end()]}*"
    for depth in range(len(parts) - 2, -1, -1):
        word = _split_word(parts[depth])
        if word:
            return SPLITS[word[0].lower()], "/".join([*parts[: depth + 1], "*"])
    return "", ""
