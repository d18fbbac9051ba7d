"""What becomes of one run, out of a few small files of its folder and the tails of two that grow. Needs no torch.

Nothing in the folder is trusted: what is damaged is passed over, what cannot be read is listed in `unreadable`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mimscale.fault_tolerance.run_lock import Holder, holder_of
from mimscale.files.durations import duration
from mimscale.files.eval_reports import figures_below
from mimscale.files.metrics_lines import figures
from mimscale.files.plain_numbers import number, whole
from mimscale.files.tail import objects_backwards
from mimscale.runs.redone import Redone

RUNNING, DONE, STOPPED, CRASHED, STALE, NEW = "running", "done", "stopped", "crashed", "stale", "new"
"""running: its process lives. done: it reached its last step. stopped: it ended itself, and says why. crashed: its
process is gone and has not said why. stale: no sign of life, and no proof of its end. new: it has not begun."""

TAIL = 1 << 20
"""Bytes of a file that are read at most, from its end on."""
OTHER_SCALES = ("rankme", "spread")
"""Of the evaluations while a run trains: no accuracies."""


@dataclass(frozen=True)
class Figure:
    """The highest value of an evaluation, in percent. name: the metric of an evaluation while the run trained, or
    protocol and metric of a report. source: `evals.jsonl`, or the report's path in the run's folder.
    """

    name: str
    value: float
    step: int | None
    source: str


@dataclass
class Summary:
    """One run. step, epoch: of the last line of metrics.jsonl that counts (redone.py). total_steps, epochs: of the
    whole run. metrics: that line, None for what is not finite; logged: its Unix time. device: ranks and kind of device.
    updated: Unix time of the last sign of it. None: not known. unreadable: a line for each file that cannot be read.
    """

    path: str
    status: str = NEW
    reason: str = ""
    method: str | None = None
    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    epochs: float | None = None
    loss: float | None = None
    images_per_s: float | None = None
    figures: list[Figure] = field(default_factory=list)
    device: str | None = None
    host: str | None = None
    launches: int = 0
    updated: float | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    logged: float = 0.0

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def summary_of(run_dir: Path) -> Summary:
    """Raises nothing."""
    found = Summary(str(run_dir))
    launch = _launch(run_dir, found)
    ended = _metrics(run_dir, found)
    found.figures = sorted(_best(_figures(run_dir, found)), key=lambda figure: figure.name)
    if found.step is None and launch:
        found.step = whole(launch.get("step"))
    if per_epoch := number(launch.get("steps_per_epoch")):
        found.epochs = None if found.total_steps is None else number(found.total_steps / per_epoch)
        if found.epoch is None and found.step is not None:
            found.epoch = number(found.step / per_epoch)
    try:
        holder = holder_of(run_dir)
    except OSError as error:
        holder = None
        found.unreadable.append(_unreadable("lock", error))
    found.status, found.reason = _status(run_dir, holder, ended, launch)
    return found


def _launch(run_dir: Path, found: Summary) -> dict[str, Any]:
    """The last line of launches.jsonl."""
    last: dict[str, Any] = {}
    for line in _objects(run_dir, "launches.jsonl", found):
        last = last or line
        found.launches += 1
    ranks, device = whole(last.get("ranks")), last.get("device")
    found.device = f"{ranks} x {device}" if ranks and isinstance(device, str) else None
    found.host = last["host"] if isinstance(last.get("host"), str) else None
    found.method = last["method"] if isinstance(last.get("method"), str) else None
    found.total_steps, found.updated = whole(last.get("total_steps")), number(last.get("time"))
    return last


def _metrics(run_dir: Path, found: Summary) -> str | None:
    """Fill in the last line of numbers. Returns why the last launch stopped, if it says so."""
    ended, began, redone = None, False, Redone()
    for line in _objects(run_dir, "metrics.jsonl", found):
        event, at_s = line.get("event"), number(line.get("time")) or 0.0
        found.updated = max(found.updated or 0.0, at_s) or None
        if event == "stopped" and ended is None and not began:
            ended = str(line.get("reason") or "asked by another rank")
        began = began or event == "start"
        if redone.counts(line) and event is None:
            found.step, found.logged = whole(line["step"]), at_s
            found.metrics = {k: v for k, v in figures(line).items() if v is None or number(v) is not None}
            found.loss, found.epoch = found.metrics.get("loss"), found.metrics.get("epoch")
            found.images_per_s = found.metrics.get("images_per_s")
            break
    return ended


def _figures(run_dir: Path, found: Summary) -> Iterator[Figure]:
    """Of evals.jsonl and of the reports. Of evaluations of one step the later counts."""
    known: set[tuple[int | None, str]] = set()
    first: int | None = None
    # from the last line on: of steps that were done again, after a roll-back or a resume, only the later lines count
    for line in _objects(run_dir, "evals.jsonl", found):
        at = whole(line.get("at"))
        if at is None or (first is not None and at > first) or _left(at, line, found):
            continue
        first = at
        for metric, value in figures(line).items():
            if (at, metric) not in known and (share := number(value)) is not None:
                known.add((at, metric))
                yield Figure(metric, share, at, "evals.jsonl")
    for one in figures_below(run_dir / "eval", run_dir, found.unreadable):
        metric = one.protocol if one.metric == one.protocol else f"{one.protocol} {one.metric}"
        yield Figure(metric, one.value, one.step, one.report)


def _left(at: int, line: Mapping[str, Any], found: Summary) -> bool:
    """Whether the run has gone back behind step `at` since, and has not come there again."""
    return found.step is not None and at > found.step and (number(line.get("time")) or 0.0) < found.logged


def _best(figures: Iterable[Figure]) -> list[Figure]:
    best: dict[str, Figure] = {}
    for figure in figures:
        if figure.name not in best or figure.value > best[figure.name].value:
            best[figure.name] = figure
    return list(best.values())


def _status(run_dir: Path, holder: Holder | None, ended: str | None, launch: dict[str, Any]) -> tuple[str, str]:
    if holder is not None and holder.alive is not False and not holder.silent:
        return RUNNING, "asked to stop" if (run_dir / "stop").exists() else ""
    if (run_dir / "done").exists():
        return DONE, ""
    if ended is not None:
        return STOPPED, ended
    launched_s = number(launch.get("time")) or 0.0
    if _changed_s(run_dir / "guard.json") >= launched_s and (run_dir / "guard.json").exists():
        return STOPPED, "too many bad steps: guard.json"
    if holder is not None and holder.alive is not False:
        age = duration(holder.beat_age_s)
        return STALE, f"no sign of life from process {holder.pid} on {holder.host} for {age}"
    if not launch and holder is None:
        return NEW, ""
    if _changed_s(run_dir / "hang") >= launched_s and (run_dir / "hang").is_dir():
        return CRASHED, "it stood still: hang/"
    where = f"process {holder.pid} on {holder.host} is gone" if holder is not None else "it has left"
    return CRASHED, f"{where} without a word"


def age_s(summary: Summary) -> float | None:
    """Seconds since the last sign of a run."""
    return None if summary.updated is None else max(0.0, time.time() - summary.updated)


def _objects(run_dir: Path, name: str, found: Summary, limit: int = TAIL) -> Iterator[dict[str, Any]]:
    try:
        yield from objects_backwards(run_dir / name, limit)
    except FileNotFoundError:
        return
    except OSError as error:
        found.unreadable.append(_unreadable(name, error))


def _unreadable(name: str, error: OSError) -> str:
    return f"{name} cannot be read ({error.strerror or error})"


def _changed_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return -1.0
