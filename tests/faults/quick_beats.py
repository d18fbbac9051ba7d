"""The trainer with a lock that watches a silent owner on another host for a second instead of a minute."""

from __future__ import annotations

import sys

from mimscale.__main__ import entry
from mimscale.fault_tolerance import run_lock

if __name__ == "__main__":
    run_lock.BEAT_S = 0.1
    sys.argv[0] = "mimscale"
    entry()
