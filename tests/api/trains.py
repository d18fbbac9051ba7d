"""Several `mimscale.train` in this process:  [torchrun] -m tests.api.trains FOLDER SHARDS

FOLDER holds recipe.yaml, and gets a JSON line of what each call returned or raised, and of what it left behind.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mimscale


def attempt(work: Callable[[], mimscale.TrainResult]) -> dict[str, Any]:
    try:
        found = asdict(work())
    except (mimscale.UserError, mimscale.Stopped) as error:
        found = {"error": type(error).__name__, "text": str(error)}
    signals = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    # the interpreter cannot know when a thread that was told to end has; each gets a while
    for thread in threading.enumerate():
        if thread.name in ("watchdog", "lock"):
            thread.join(10)
    names = sorted(thread.name for thread in threading.enumerate() if thread.name in ("watchdog", "lock"))
    return {**found, "threads": names, "default_signals": signals == [signal.SIG_DFL] * 2, "gc": gc.isenabled()}


def main(folder: Path, shards: Path) -> None:
    recipe, base = folder / "recipe.yaml", {"data.shards": shards, "data.workers": 1}
    more = {**base, "optim.betas": (0.9, 0.99), "init": None}
    zero3 = {**base, "engine.ds_config": "cpu_zero3_fp32", "seed": 1}
    short = {**base, "schedule.steps": 4}
    thread_result: list[dict[str, Any]] = []
    in_thread = threading.Thread(
        target=lambda: thread_result.append(attempt(lambda: mimscale.train(recipe, base, run_dir=folder / "c")))
    )
    found = {
        "first": attempt(lambda: mimscale.train(recipe, more, run_dir=folder / "a")),
        "refused": attempt(lambda: mimscale.train(recipe, short, run_dir=folder / "a")),
        # after the process group, the lock and the watchdog were opened
        "damaged": attempt(lambda: mimscale.train(recipe, base, run_dir=folder / "damaged")),
        "again": attempt(lambda: mimscale.train(str(recipe), more, run_dir=folder / "a")),
        "zero3": attempt(lambda: mimscale.train(recipe, zero3, run_dir=str(folder / "b"))),
        "fork": attempt(lambda: mimscale.train(recipe, short, run_dir=folder / "a", fork=folder / "forked")),
        "value": attempt(lambda: mimscale.train(recipe, {"student": object()})),
        "key": attempt(lambda: mimscale.train(recipe, {"schedule.stepz": 3})),
    }
    in_thread.start()
    in_thread.join()
    found["thread"] = thread_result[0]
    rank = os.environ.get("RANK", "0")
    (folder / f"found-{rank}.json").write_text(json.dumps(found, default=str))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
