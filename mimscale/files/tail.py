"""The last lines of a file that grows, without what stands before them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mimscale.files.regular import open_regular

CHUNK = 1 << 14  # bytes


def lines_backwards(path: Path, limit: int = 1 << 20) -> Iterator[bytes]:
    """Lines of a file without their ends, last one first, out of its last `limit` bytes; a line that begins before them
    is left out. Raises OSError; also for what is no regular file.
    """
    with open_regular(path) as file:
        size = at = file.seek(0, os.SEEK_END)
        first = max(0, at - limit)
        rest = b""
        while at > first:
            part = min(CHUNK, at - first)
            at -= part
            file.seek(at)
            rest, *lines = (file.read(part) + rest).split(b"\n")
            yield from reversed(lines)
        if first == 0 and size:
            yield rest


def objects_backwards(path: Path, limit: int = 1 << 20) -> Iterator[dict[str, Any]]:
    """The JSON objects among these lines. NaN and infinity become None; what is no JSON object is passed over."""
    for line in lines_backwards(path, limit):
        if not line.strip():
            continue
        try:
            values = _DECODER.decode(line.decode())
        except (ValueError, RecursionError):
            continue  # cut off by a crash, or being written now
        if isinstance(values, dict):
            yield values


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=lambda word: None)
