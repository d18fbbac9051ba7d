"""The small files of a run, none of which may end it: what a disk refuses waits in memory and is tried again."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

from mimscale.errors import warn
from mimscale.files.atomic import atomic_write
from mimscale.files.regular import open_to_write

_NO_FILE = (errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)  # what waiting does not change


class RetryingWriter:
    """`append` and `replace` never raise OSError; each call also tries what waits. For one writer of each file."""

    def __init__(self) -> None:
        self._lines: dict[Path, bytes] = {}  # what is still to be appended
        self._whole: dict[Path, bytes] = {}  # what is still to be the content
        self._begun: set[Path] = set()
        self._refused: dict[Path, OSError] = {}
        self._mutex = threading.Lock()

    def append(self, path: Path, text: str) -> None:
        """Whole lines at the end of a file."""
        with self._mutex:
            self._lines[path] = self._lines.get(path, b"") + text.encode()
        self.flush()

    def replace(self, path: Path, text: str) -> None:
        """The content of a file: the old one or the new one, never a part."""
        with self._mutex:
            self._whole[path] = text.encode()
        self.flush()

    def flush(self, patience_s: float = 0.0) -> list[str]:
        """Try for so long. Returns what is not on the disk then, a phrase for each file."""
        end_s = time.monotonic() + patience_s
        while True:
            with self._mutex:
                for path in [*self._lines, *self._whole]:
                    self._try(path)
                left = [f"{path} ({error.strerror or error})" for path, error in self._refused.items()]
                hopeless = all(error.errno in _NO_FILE for error in self._refused.values())
            if hopeless or time.monotonic() >= end_s:
                return left
            time.sleep(min(1.0, patience_s))

    def _try(self, path: Path) -> None:
        try:
            if path in self._lines:
                self._append(path)
            if path in self._whole:
                self._replace(path)
            self._refused.pop(path, None)
        except OSError as error:
            if path not in self._refused:
                warn(f"{path}: {error.strerror or error}; what belongs there waits in memory")
            self._refused[path] = error

    def _append(self, path: Path) -> None:
        file = open_to_write(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        try:
            if path not in self._begun:
                self._begun.add(path)
                size = os.fstat(file).st_size
                if size and os.pread(file, 1, size - 1) != b"\n":  # a killed run left half a line
                    self._lines[path] = b"\n" + self._lines[path]
            while self._lines[path]:
                self._lines[path] = self._lines[path][os.write(file, self._lines[path]) :]
            del self._lines[path]
        finally:
            os.close(file)

    def _replace(self, path: Path) -> None:
        atomic_write(path, self._whole[path])
        del self._whole[path]
