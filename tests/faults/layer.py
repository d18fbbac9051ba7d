"""The fault layer below every trainer: a preloaded library (shim.c) and the page of memory that controls it."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = "FAULT_PAGE"
KILL, SLOW = -1, -2  # or an errno
FOREVER = 2**62
CHANGES = "owsmru"  # all that changes a folder: see shim.c


class Page(ctypes.Structure):
    """As in shim.c."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("spared", "action", "delay_ms", "armed")),
        *((name, ctypes.c_int64) for name in ("skip", "count", "seen", "struck", "clock_s")),
        *((name, ctypes.c_char * size) for name, size in (("ops", 16), ("under", 512), ("trace", 4096))),
    ]


class Layer:
    """One rule at a time, for all processes but this one."""

    def __init__(self) -> None:
        with open(os.environ[PAGE], "r+b") as file:
            self._page = Page.from_buffer(mmap.mmap(file.fileno(), 0))
        self._page.spared = os.getpid()

    def arm(self, ops: str, under: Path, action: int, skip: int = 0, count: int = FOREVER, delay_ms: int = 0) -> None:
        """Of the operations `ops` on paths below `under` let `skip` pass, then strike `count` of them."""
        self.watch(ops, under)
        page = self._page
        page.action, page.skip, page.count, page.delay_ms = action, skip, count, delay_ms
        page.armed = 1

    def watch(self, ops: str, under: Path) -> None:
        """Only note them, in `trace`."""
        page = self._page
        page.armed, page.under, page.trace = 0, b"", b""
        page.seen = page.struck = 0
        page.ops, page.under = ops.encode(), str(under).encode()

    def rest(self) -> int:
        """Let everything pass; how often it struck."""
        self._page.armed, self._page.under = 0, b""
        return self.struck

    @property
    def struck(self) -> int:
        return int(self._page.struck)

    @property
    def trace(self) -> str:
        """The operations seen since the rule was set, a letter each."""
        return str(self._page.trace.decode())

    def shift_clock(self, seconds: int) -> None:
        """The trainers' time of day."""
        self._page.clock_s = seconds


def rerun_with_layer() -> int:
    """This program once more, with the layer below it and all that it forks. Needs a C compiler."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        library, page = Path(folder, "shim.so"), Path(folder, "page")
        words = ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(Path(__file__).with_name("shim.c"))]
        subprocess.run(words, check=True)
        page.write_bytes(bytes(ctypes.sizeof(Page)))
        environment = {**os.environ, "LD_PRELOAD": str(library), PAGE: str(page), "TMPDIR": folder}
        try:
            return subprocess.run([sys.executable, "-m", "tests.faults", *sys.argv[1:]], env=environment).returncode
        finally:
            for line in Path("/proc/mounts").read_text().splitlines():
                if line.split()[1].startswith(folder):  # one that was killed has not cleared up
                    subprocess.run(["umount", "-l", line.split()[1]])
