"""Faults x outcomes:  python -m tests.faults [--seed S] [--faults N] [--only KIND,...] [--quick] [--out FILE]

Real runs are struck by a seeded sequence of faults, started again until they are done, and compared with runs that
nothing struck.
"""

from __future__ import annotations

import os
import sys

from tests.faults.layer import PAGE, rerun_with_layer

if __name__ == "__main__":
    if PAGE in os.environ:
        from mimscale.distributed.end_process import end_process
        from tests.faults.soak import main

        end_process(main())
    sys.exit(rerun_with_layer())
