"""Numbers out of reports of `mimscale evaluate`, none of which is trusted. Needs no torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mimscale.files.regular import read_regular

BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError)
"""What a file that is no report may raise."""
OF_THE_MACHINE = ("name", "pool", "device", "ranks", "alexnet")
FITTED = "global_batch"  # of linear_mae: it follows from the size of the data set


class Figure(NamedTuple):
    """One number out of a report. step: of the checkpoint, None where its file does not say. val: fingerprint of the
    data. report: its path, from the run's folder. options: of the protocol. changed: those that are not the published
    ones, in words.
    """

    protocol: str
    metric: str
    value: float
    pool: str
    step: int | None
    sha256: str | None
    val: str | None
    report: str
    options: Mapping[str, Any]
    changed: Sequence[str]


def parsed(data: bytes | str) -> Any:
    """JSON whose values can be written as JSON again: NaN and infinity, which it does not have, become words."""

    def number(text: str) -> float | str:
        value = float(text)
        return value if math.isfinite(value) else text

    return json.loads(data, parse_constant=str, parse_float=number)


def scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def figures_below(folder: Path, run_dir: Path, unreadable: list[str]) -> Iterator[Figure]:
    """Of the reports in a folder of a run, in the order of their names; none where there is no such folder. unreadable:
    gets a line for what is no report, or cannot be read, named from `run_dir` on.
    """
    for path in sorted(listed(folder, run_dir, unreadable)):
        if path.suffix == ".json":
            name = str(path.relative_to(run_dir))
            try:
                yield from figures_of(path, name)
            except BROKEN as error:
                unreadable.append(f"{name} is no report of an evaluation ({type(error).__name__}: {error})")


def listed(folder: Path, run_dir: Path, unreadable: list[str]) -> list[Path]:
    """The content of a folder of a run, nothing where there is none. unreadable: gets a line if it cannot be read."""
    try:
        return [folder / name for name in os.listdir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        unreadable.append(f"{folder.relative_to(run_dir)} cannot be read ({error.strerror})")
        return []


def figures_of(path: Path, name: str) -> list[Figure]:
    """Every metric of every row that measures a checkpoint of the run in whose `eval` folder the report lies; baselines
    have no source. Raises one of BROKEN for a file that is no report.
    """
    report = parsed(read_regular(path))
    protocol = report["protocol"]
    kind = text(protocol["name"])
    options = {key: value for key, value in protocol.items() if key not in OF_THE_MACHINE and _plain(value)}
    changed = [line for line in map(text, protocol.get("differs_from_paper", [])) if not line.startswith(FITTED)]
    changed += [f"{key} = {value}" for key, value in report.get("changed", {}).items() if _plain(value)]

    def figure(of: str, metric: str, value: Any, row: Mapping[str, Any], source: Mapping[str, Any], val: Any) -> Figure:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{metric} = {str(value)[:40]}")
        step, sha256 = source.get("step"), source.get("sha256")
        if isinstance(step, bool) or not isinstance(step, int | None):
            raise ValueError(f"step = {str(step)[:40]} is no whole number")
        fingerprint = None if val is None else text(val["fingerprint"])
        hashed = None if sha256 is None else text(sha256)
        pool = text(row.get("pool", ""))
        return Figure(of, metric, float(value), pool, step, hashed, fingerprint, name, options, changed)

    found: dict[tuple[str, ...], list[Figure]] = {}
    for row in report["rows"]:
        if kind == "transfer":
            of_row = list(_transfer(report, row))
        elif "source" in row:
            vals = {m: report["val"] if "val" in report else report.get("sets", {}).get(m) for m in row}
            metrics = report["metrics"] if "metrics" in report else report["columns"]
            # of small data sets some are absent
            of_row = [(kind, metric, row[metric], row, row, vals[metric]) for metric in metrics if metric in row]
        else:
            continue
        sources = [text(source["source"]) for *_, source, _ in of_row if "source" in source]
        found.setdefault(_run_of(sources[0]) if sources else (), []).extend(figure(*words) for words in of_row)
    return _of_run(found, path.absolute().parent.parent.parts)


def _run_of(source: str) -> tuple[str, ...]:
    """Parts of the path of a checkpoint's run, or of the folder of a file."""
    parts = Path(source).parts
    return parts[: parts.index("checkpoints")] if "checkpoints" in parts else parts[:-1]


def _of_run(found: Mapping[tuple[str, ...], list[Figure]], run: tuple[str, ...]) -> list[Figure]:
    """Of the figures of several runs those of one: whose path ends most like its own, which may have moved."""

    def alike(parts: tuple[str, ...]) -> int:
        pairs = zip(reversed(parts), reversed(run), strict=False)
        return next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(parts), len(run)))

    most = max(map(alike, found), default=0)
    if len(found) > 1:
        return [figure for parts in found if alike(parts) == most > 0 for figure in found[parts]]
    return [figure for figures in found.values() for figure in figures]


def _transfer(report: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Arguments of a figure: of each data set, and their mean. The networks' checkpoints stand in the parts."""
    parts = {part["set"]: part for part in report["parts"]}
    rows = (of for part in parts.values() for of in part["rows"] if of["network"] == row["network"])
    source = next((of for of in rows if "source" in of), None)
    own = row.get("sources")
    if source is None and own is None:
        return
    protocol = f"transfer {text(row['protocol'])}"
    for name, value in row["values"].items():
        yield protocol, name, value, row, source if own is None else own[name], parts.get(name, {}).get("val")
    yield protocol, "mean", row["mean"], row, source if own is None else {}, None


def text(value: Any) -> str:
    """Raises ValueError for anything else."""
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:40]} is no text")
    return value


def _plain(value: Any) -> bool:
    return scalar(value) or (isinstance(value, list) and all(map(scalar, value)))


def options_that_differ(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each figure, in what its report differs from others of the same protocol; empty for most."""
    words = []
    for one in figures:
        others = [
            other for other in figures if other["protocol"] == one["protocol"] and other["metric"] == one["metric"]
        ]
        keys = dict.fromkeys(key for other in others for key in other["options"])
        found = [
            f"{key} = {_shown(one['options'].get(key))}"
            for key in keys
            if any(other["options"].get(key) != one["options"].get(key) for other in others)
        ]
        if any(other["val"] != one["val"] for other in others):
            found.append(f"val {(one['val'] or 'unknown')[:8]}")
        words.append("; ".join(found))
    return words


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
