"""Lists of faults: the first ten are printed, and a file has all of them."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from mimscale.data.names import one_line

SHOWN = 10


def report(word: str, faults: Sequence[str], path: Path, to: TextIO | None = None) -> str:
    """Print the first ten faults as "WORD: ...". Returns "", or where the file with all of them is, as text.

    path: of that file, which is written only if there are more than ten; if its folder cannot be written, a file of the
    same name in the folder for temporary files.
    """
    for fault in faults[:SHOWN]:
        print(f"{word}: {one_line(fault)}", file=to or sys.stderr)
    if len(faults) <= SHOWN:
        return ""
    text = "".join(f"{one_line(fault)}\n" for fault in faults)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError:
        path = Path(tempfile.mkdtemp()) / path.name
        path.write_text(text, encoding="utf-8")
    return f" (all {len(faults):,} are in '{path}')"
