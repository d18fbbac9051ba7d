"""How a process of this package ends."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
from contextlib import suppress
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """Leave without taking the interpreter apart, and without the processes that this one has started.

    DeepSpeed keeps process groups beyond their destruction, so their threads still run when the work is done. One that
    asks for the interpreter while it is being taken apart would abort a process that had succeeded.
    """
    for child in multiprocessing.active_children():  # they ignore the signal with which multiprocessing ends them
        child.kill()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
