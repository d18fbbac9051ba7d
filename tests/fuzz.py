"""What the fuzz tests share: how many cases with which seeds, and that none of them hangs.

MIMSCALE_FUZZ=2000 python -m pytest -n 0 FILE --hypothesis-seed=1      # the long run; without, the same 60 each time
"""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import HealthCheck, settings

RUNS = int(os.environ.get("MIMSCALE_FUZZ", "60"))
FUZZ = settings(
    max_examples=RUNS,
    deadline=None,
    database=None,
    derandomize="MIMSCALE_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
CPU_S, WAIT_S = 15, 120  # a machine with other load makes a case longer, but does not make it compute more


@contextmanager
def no_hang() -> Iterator[None]:
    """TimeoutError inside a case that computes for CPU_S or waits for WAIT_S; a warning for one that took CPU_S."""

    def ring(number: int, _: object) -> None:
        raise TimeoutError(f"{signal.Signals(number).name}: {CPU_S} s of computing, or {WAIT_S} s")

    before = [(number, signal.signal(number, ring)) for number in (signal.SIGALRM, signal.SIGPROF)]
    timers = ((signal.ITIMER_REAL, WAIT_S), (signal.ITIMER_PROF, CPU_S))
    start_s = time.monotonic()
    for timer, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, _ in timers:
            signal.setitimer(timer, 0)
        for number, handler in before:
            signal.signal(number, handler)
    if time.monotonic() - start_s > CPU_S:
        warnings.warn(f"a case took {time.monotonic() - start_s:.0f} s", stacklevel=3)
