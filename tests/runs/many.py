"""How long `mimscale runs` takes over many runs: `python -m tests.runs.many [RUNS]`. Writes them in a temporary folder.

Each has 2,000 lines in metrics.jsonl and 40 evaluations. Prints the fastest of five calls, a process each.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mimscale.checkpoint.run_folder import git_commit
from tests.runs.test_runs import evals, write_run

CALLS = 5


def main(runs: int) -> None:
    with tempfile.TemporaryDirectory() as root:
        numbers = {"data_wait": 0.1, "memory_gib": 3.2, "lr": 1e-4, "grad_norm": 1.2, "mfu": 0.4, "power_w": 300.0}
        steps = [{"step": s, "loss": 1 / s, "images_per_s": 1e3, "epoch": s / 312, **numbers} for s in range(1, 2001)]
        lines = [*(evals(step, step / 50) for step in range(50, 2001, 50)), *steps]
        for number in range(runs):
            write_run(Path(root, f"group-{number % 10}", f"run-{number}"), *lines)
        took = []
        for _ in range(CALLS):
            start_s, before = time.monotonic(), os.times()
            subprocess.run([sys.executable, "-m", "mimscale", "runs", root], check=True, stdout=subprocess.DEVNULL)
            after = os.times()
            cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
            took.append((time.monotonic() - start_s, cpu_s))
    figures = {
        "runs": runs,
        "seconds": round(min(wall_s for wall_s, _ in took), 2),
        "cpu_s": round(min(cpu_s for _, cpu_s in took), 2),
        "commit": (git_commit() or "unknown")[:12],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
