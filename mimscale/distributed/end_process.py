"""How a process of this package ends."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import NoReturn

EXIT_S, REPEATED_S = 15.0, 1.0


def end_process(code: int) -> NoReturn:
    """Leave without taking the interpreter apart, and without the processes that this one has started.

    DeepSpeed keeps process groups beyond their destruction, so their threads still run when the work is done. One that
    asks for the interpreter while it is being taken apart would abort a process that had succeeded. What libraries want
    to do at the exit gets EXIT_S: some wait for a server that does not answer.
    """
    start_s = time.monotonic()

    def leave_at_once(number: int, frame: object) -> None:
        """An impatient Ctrl-C ends this without a traceback; not one that torchrun repeats to its ranks."""
        if time.monotonic() - start_s > REPEATED_S:
            os._exit(128 + number)

    with suppress(ValueError):  # of another thread than the main one
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, leave_at_once)
    for child in multiprocessing.active_children():  # they ignore the signal with which multiprocessing ends them
        child.kill()
    last = threading.Thread(target=atexit._run_exitfuncs, name="exit", daemon=True)
    last.start()
    last.join(EXIT_S)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError):  # nobody reads it any more, or it was closed from the start
            stream.flush()
    os._exit(code)
