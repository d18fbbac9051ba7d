"""One input is one set: files or folders of several splits (train, validation, test) are not merged."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from mimscale.errors import UserError

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(SPLITS, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)


def chosen_files(folder: Path, paths: Sequence[Path], pattern: str | None) -> list[Path]:
    """The files whose names match the pattern; None = all. Raises UserError if there are none, or several splits."""
    if pattern is not None:
        kept = [path for path in paths if fnmatchcase(path.name, pattern)]
        if paths and not kept:
            raise UserError(f"--files '{pattern}' matches none of the {len(paths):,} files of '{folder}'")
        return kept
    found: Counter[str] = Counter()
    patterns: dict[str, str] = {}
    for path in paths:
        word = _WORD.search(path.stem)
        if word:
            split = SPLITS[word[1].lower()]
            found[split] += 1
            patterns.setdefault(split, f"{path.name[: word.end()]}*")
    if len(found) > 1:
        text = ", ".join(f"{count:,} of {split}" for split, count in found.items())
        choice = " or ".join(f"--files '{pattern}'" for pattern in patterns.values())
        raise UserError(f"'{folder}' holds files of several splits ({text}); choose one with {choice}")
    return list(paths)


def check_classes(root: Path, names: Sequence[str]) -> None:
    """Raises UserError if the class folders of `root` are those of splits. One class may be called train."""
    splits = [name for name in names if name.lower() in SPLITS]
    if len({SPLITS[name.lower()] for name in splits}) > 1 or len(splits) == len(names) > 0:
        raise UserError(
            f"'{root}' is the root of a data set: {', '.join(splits)} are splits, not classes; "
            f"give '{root / splits[0]}', and each split its own destination"
        )
