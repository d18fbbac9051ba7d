"""What `index` has read so far: one line of JSON per shard, appended while it runs and removed with the manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.scan_shard import ShardContents

JOURNAL = ".index_journal.jsonl"


class Scan(NamedTuple):
    """A shard that was read. changed: its time of modification in ns, or 0 on a server."""

    name: str
    bytes: int
    changed: int
    sha256: str | None
    contents: ShardContents


class Journal:
    """key: of the options; lines with another key are passed over."""

    def __init__(self, folder: Path, key: str):
        self.path, self.key = folder / JOURNAL, key

    def read(self) -> dict[str, Scan]:
        """Name -> scan. A line that was cut off by a kill is passed over."""
        return {scan.name: scan for scan in self._lines()}

    def append(self, scan: Scan) -> None:
        contents = scan.contents._replace(spans=scan.contents.spans.tolist())
        line = json.dumps([self.key, *scan[:4], contents]) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        with open(fd, "wb") as file:
            file.write(line.encode())

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _lines(self) -> Iterator[Scan]:
        with suppress(FileNotFoundError), open(self.path, "rb") as file:
            for line in file:
                with suppress(ValueError, TypeError):
                    key, name, size, changed, checksum, (spans, labels, left_out, keys) = json.loads(line)
                    if key == self.key:
                        array = np.array(spans, dtype=np.int64).reshape(-1, 2)
                        yield Scan(name, size, changed, checksum, ShardContents(array, labels, left_out, keys))
