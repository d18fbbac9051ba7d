"""Cases of `bench train`, each in a process of its own with a time limit: one that fails costs one row."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimscale.training.out_of_memory import says_out_of_memory

LIMIT_S = 90.0
LEAST_S = 8.0  # a case that has less time left is not started


@dataclass(frozen=True)
class TrainCase:
    """overrides: of the recipe. words: options of `bench train`. limit_s: after which the process is ended. shards:
    whether it reads JPEGs, which are written before it starts; its time limit does not count that.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    limit_s: float = LIMIT_S
    shards: bool = False


def run_case(case: TrainCase, words: Sequence[str], limit_s: float) -> dict[str, Any]:
    """The row of a case: what `bench train` measured, or `error` with one line. words: options of all cases."""
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mimscale-bench-") as folder:
        file = Path(folder) / "case.json"
        command = [sys.executable, "-m", "mimscale", "bench", "train", case.recipe, *case.overrides]
        command += [*case.words, *words, "--out", str(file)]
        done = ended(command, limit_s)
        row: dict[str, Any] = {"case": case.name, "recipe": case.recipe, "overrides": list(case.overrides)}
        if isinstance(done, str):
            row |= {"error": done}
        elif done.returncode or not file.exists():
            row |= {"error": reason(done.stderr, done.returncode), "stderr": done.stderr[-4000:]}
        else:
            row |= json.loads(file.read_text())["cases"][0] | {"case": case.name}
    return row | {"seconds": round(time.monotonic() - start_s, 1)}


def ended(command: Sequence[str], limit_s: float) -> subprocess.CompletedProcess[str] | str:
    """The process when it has ended, or one line where it had to be ended with all that it started."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"not finished after {limit_s:.0f} s"
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(list(command), process.returncode, out, err)


def reason(stderr: str, code: int) -> str:
    """One line of what a process said before it failed."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if out_of_memory(stderr, code):
        return next((line[:300] for line in reversed(lines) if out_of_memory(line, 0)), f"killed ({code})")
    return lines[-1][:300] if lines else f"exit code {code}"


def out_of_memory(stderr: str, code: int) -> bool:
    """Whether a process failed because it asked for more memory than there is."""
    return code == -signal.SIGKILL or says_out_of_memory(stderr)


def run_cases(
    cases: Sequence[TrainCase],
    words: Sequence[str],
    budget_s: float,
    show: Callable[[dict[str, Any]], None],
    *,
    make_shards: Callable[[], Path] | None = None,
) -> Iterator[dict[str, Any]]:
    """Run the cases in order, hand each row to `show` as it comes, and stop when the time is over: later cases become
    rows that say so.
    """
    start_s = time.monotonic()
    for case in cases:
        row = _row(case, words, budget_s - (time.monotonic() - start_s), make_shards)
        show(row)
        yield row


def _row(
    case: TrainCase, words: Sequence[str], left_s: float, make_shards: Callable[[], Path] | None
) -> dict[str, Any]:
    if left_s < LEAST_S:
        return {"case": case.name, "recipe": case.recipe, "error": "not started: no time left"}
    if case.shards:
        assert make_shards is not None
        start_s = time.monotonic()
        try:
            place = make_shards()
        except Exception as error:
            return {"case": case.name, "recipe": case.recipe, "error": f"shards: {type(error).__name__}: {error}"}
        left_s -= time.monotonic() - start_s
        words = [f"data.shards={place}", "--data", *words]
    return run_case(case, words, min(case.limit_s, max(left_s, 1.0)))
