"""`mimscale.train`: a recipe trained in this process."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimscale.api.overrides import as_words
from mimscale.checkpoint import format as checkpoint
from mimscale.config.recipes import load_recipe
from mimscale.config.run import RunConfig
from mimscale.errors import UserError
from mimscale.fault_tolerance.preemption import HANDLED
from mimscale.files.metrics_lines import figures


@dataclass(frozen=True)
class TrainResult:
    """What a run left. The same on every rank.

    run_dir: its folder.  step: of its newest checkpoint, from which the same call would continue.  finished: whether
    that is the last step; a signal or a stop file ends a run before.  metrics: the last line of metrics.jsonl: name ->
    value, None for what was not finite.
    """

    run_dir: Path
    step: int
    finished: bool
    metrics: dict[str, float | None]


def train(
    recipe: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    run_dir: str | Path | None = None,
    fork: str | Path | None = None,
    words: Sequence[str] = (),
) -> TrainResult:
    """Pre-train as `mimscale train RECIPE` does, in this process, until the last step or a signal that asks to stop.

    recipe: the name of a recipe of this package, or a path to a YAML file.
    overrides: "section.key" -> value, as the recipe would have it in YAML: {"schedule.epochs": 2, "init": None}.
    run_dir: the run's folder, runs/RECIPE by default; a run that it holds is continued, a finished one is left alone.
    fork: a folder for a new run that starts from the weights of `run_dir`.
    words: further overrides, as on the command line: "section.key=value".

    Under torchrun or srun every rank calls it, and each is one rank of the run. In a plain process it may be called
    several times, on one kind of device; DeepSpeed's process group stays open in between. It must be called from the
    main thread, because it answers SIGTERM and SIGUSR1 while it runs. torch's global generators are seeded.

    Raises mimscale.UserError with one line for bad input, and mimscale.Stopped for a run that ended itself.

    >>> import mimscale
    >>> result = mimscale.train("mae_tiny", {"schedule.steps": 10, "data.workers": 0}, run_dir="runs/ten")
    >>> result.run_dir, result.step, result.finished, sorted(result.metrics)[:3]
    (PosixPath('runs/ten'), 10, True, ['damaged', 'data_wait', 'epoch'])
    """
    words = [*as_words(overrides or {}), *words]
    config = load_recipe(str(recipe), words)
    folder = Path(run_dir) if run_dir is not None else Path("runs") / Path(recipe).stem
    target = None if fork is None else Path(fork)
    _run(config, folder, target, ("mimscale.train", str(recipe), *words), str(recipe))
    return _result(target or folder)


def _run(config: RunConfig, run_dir: Path, fork: Path | None, command: tuple[str, ...], recipe: str) -> None:
    from mimscale.monitoring.metrics import StartupTimer
    from mimscale.training.checked_run import prepare
    from mimscale.training.loop import train

    if threading.current_thread() is not threading.main_thread():
        raise UserError("mimscale.train answers signals, so it must be called from the main thread; start a process")
    startup = StartupTimer()
    startup.end("before")
    checked = prepare(config, run_dir, fork, command, recipe)
    _refuse_another_device(checked.world.device.type)
    startup.end("checks")
    with _handlers_restored(), ExitStack() as closing:
        train(checked, startup, closing)


def _refuse_another_device(kind: str) -> None:
    """DeepSpeed chooses its accelerator once per process, and the process group its backend."""
    import torch.distributed as dist

    if dist.is_initialized() and ("nccl" in dist.get_backend()) != (kind == "cuda"):
        other = "cuda" if kind == "cpu" else "cpu"
        raise UserError(f"engine.device = {kind}: this process has trained on {other}; start another process")


@contextmanager
def _handlers_restored() -> Iterator[None]:
    """A run ignores its signals from its last save on, because its process usually ends then; this one goes on."""
    before = {number: signal.getsignal(number) for number in HANDLED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _result(run_dir: Path) -> TrainResult:
    lines = [line for line in map(_values, (run_dir / "metrics.jsonl").read_bytes().splitlines()) if line]
    last: dict[str, Any] = next((line for line in reversed(lines) if "step" in line), {})
    return TrainResult(run_dir, checkpoint.newest_step(run_dir), (run_dir / "done").exists(), figures(last))


def _values(line: bytes) -> dict[str, Any]:
    """A line of metrics.jsonl; nothing for one that a killed start or a disk has damaged."""
    try:
        values = json.loads(line)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
