"""Runs -> one HTML page that needs nothing else: no file, no network. Needs bokeh and jinja2.

Everything that comes from a run is escaped by jinja2; inside the charts stand only numbers, our own words, and texts
that bokeh shows as text.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mimscale import __version__
from mimscale.errors import UserError, without_secrets
from mimscale.files.durations import duration
from mimscale.report import charts, images
from mimscale.report.runs import Run, clean, recipe_differences, setup_line
from mimscale.runs.history import History

LIMIT = 5_000_000
"""Bytes of a page, whatever the number of panels: images become smaller, and are left out in the end."""
SIDES = (80, 64, 48, 32, 24, 0)
LEFT_OUT = f"left out: with them the page would be larger than {LIMIT // 1_000_000} MB"
MOST_LAUNCHES, MOST_LINES = 20, 12
GROUPS = {
    "training": "Training",
    "speed": "Speed and memory",
    "evals": "Evaluated while training",
    "more": "More of the method",
}


def missing() -> str | None:
    """A line that says what to install, None where nothing is missing."""
    try:
        import bokeh  # noqa: F401
        import jinja2  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed; pip install -e '.[report]'"
    return None


def render(runs: Sequence[Run], now_s: float | None = None) -> str:
    """The page. Raises UserError where bokeh or jinja2 is missing."""
    if (line := missing()) is not None:
        raise UserError(line)
    from bokeh.embed import components
    from bokeh.resources import Resources

    timeline, drawn, unchanged = charts.make(runs)
    script, (timeline_div, *divs) = components([timeline, *(chart.figure for chart in drawn)])
    differing = recipe_differences(runs) if len(runs) > 1 else {}
    figures = _figures(runs)
    context = {
        "version": __version__,
        "made": time.strftime("%Y-%m-%d %H:%M", time.localtime(now_s)),
        "runs": [_of_run(number, run) for number, run in enumerate(runs)],
        "axes": charts.ends(runs),
        "bokeh": "\n".join(Resources(mode="inline", components=["bokeh"], minified=True).js_raw),
        "script": script,
        "timeline": timeline_div,
        "marks": _marks(runs),
        "groups": [
            (title, [(chart, div) for chart, div in zip(drawn, divs, strict=True) if chart.metric.group == group])
            for group, title in GROUPS.items()
        ],
        "unchanged": unchanged,
        "figures": figures,
        "options": _other_options(figures, len(runs)),
        "headers": _headers(runs),
        "differences": {key: [_value(value) for value in row] for key, row in differing.items()},
    }
    page = ""
    for side in SIDES:
        panels = [_panels(run, side) for run in runs]
        page = _template().render(**context, panels=panels, kinds=[_kinds(run) for run in runs])
        if len(page.encode()) < LIMIT:
            break
    return page


def _panels(run: Run, side: int) -> images.Panels:
    if side == 0:
        return images.Panels([], {}, {}, [LEFT_OUT])
    return images.read(run.path, side, run.history.rows[-1].step if run.history.rows else None)


def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mimscale.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = lambda value: "–" if value is None else f"{value:.1f}"
    return environment.get_template("report.html")


def _of_run(number: int, run: Run) -> dict[str, Any]:
    """What the page says of a run in words."""
    history, summary = run.history, run.summary
    step, total = summary.step, summary.total_steps
    loss = math.nan if summary.loss is None else summary.loss
    counts = [event.kind for event in history.events]
    launch = history.launches[-1] if history.launches else {}
    shown = {
        "recipe": run.header[0] if run.header else "",
        "step": "none logged" if step is None else f"{step:,} of {total:,}" if total else f"{step:,}",
        "epoch": _of(summary.epoch, summary.epochs),
        "samples": "" if run.samples is None else f"{run.samples:,}",
        "running time": duration(history.hours * 3600),
        "last loss": charts.in_words(charts.METRICS["loss"], loss) if "loss" in summary.metrics else "",
        "median throughput": _over(statistics.median, history, "images_per_s", "{:,.0f} images/s"),
        "waiting for data": _over(statistics.fmean, history, "data_wait", "{:.1%} of the time"),
        "ranks": _device(launch),
    }
    events = {
        "restarts": counts.count("restart"),
        "roll-backs": counts.count("rollback"),
        "skipped steps": max(counts.count("skipped"), int(summary.metrics.get("skipped_steps") or 0)),
        "saves": counts.count("saved"),
        "saves that failed": counts.count("save_failed") + counts.count("save_skipped"),
        "damaged samples": max(counts.count("damaged"), int(summary.metrics.get("damaged") or 0)),
        "log lines redone": sum(map(len, history.discarded)),
    }
    always = ("restarts", "roll-backs", "skipped steps", "saves")
    return {
        "letter": charts.letter(number),
        "name": run.name,
        "path": clean(str(run.path)),
        "setup": setup_line(run),
        "status": summary.status,
        "reason": clean(summary.reason),
        "progress": min(1.0, step / total) if step is not None and total else None,
        "shown": {key: value for key, value in shown.items() if value},
        "events": {key: value for key, value in events.items() if value or key in always},
        "colour": charts.COLOURS[number % len(charts.COLOURS)],
        "dash": " ".join(map(str, charts.DASHES[number % len(charts.DASHES)])),
        "slow": _slow(history),
        "incidents": [
            (event.step, event.text)
            for event in history.events
            if event.kind in ("skipped", "rollback", "save_failed", "evals_failed", "damaged", "stopped", "restart")
        ][-MOST_LINES:],
        "launches": [_launch(one) for one in history.launches[-MOST_LAUNCHES:]],
        "launches_before": max(0, len(history.launches) - MOST_LAUNCHES),
        "startup": {clean(key): f"{value:.1f}" for key, value in history.startup.items()},
        "recipe": {key: _value(value) for key, value in run.recipe.items()},
        "header": run.header,
        "panels_every": run.recipe.get("log.panels"),
        "notes": run.notes,
        "stages": clean(run.results["stages"]),
    }


def _of(part: float | None, whole: float | None) -> str:
    return "" if part is None else f"{part:.4g}" if whole is None else f"{part:.4g} of {whole:.4g}"


def _over(kind: Callable[[list[float]], float], history: History, name: str, shape: str) -> str:
    """The median or mean of a metric's finite values in words; empty where it has none."""
    values = [row.values[name] for row in history.rows if math.isfinite(row.values.get(name, math.nan))]
    return shape.format(kind(values)) if values else ""


def _device(launch: Mapping[str, Any]) -> str:
    ranks, device = launch.get("ranks"), launch.get("device")
    words = [f"{ranks} x" if ranks is not None else "", str(device or ""), str(launch.get("ds_config") or "")]
    return str(clean(" ".join(word for word in words if word)))


def _launch(launch: Mapping[str, Any]) -> dict[str, Any]:
    """One line of launches.jsonl, in words."""
    packages = launch.get("packages")
    versions = {k: v for k, v in packages.items() if v} if isinstance(packages, Mapping) else {}
    begun, command, commit = launch.get("time"), launch.get("command"), launch.get("commit")
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(begun)) if _sensible(begun) else "",
        "step": str(launch.get("step", "")),
        "ranks": _device(launch),
        "host": clean(str(launch.get("host") or "")),
        "commit": clean(commit) if isinstance(commit, str) else "unknown",
        "job": clean(str(launch.get("slurm_job") or "")),
        "parent": clean(str(launch.get("forked_from") or "")),
        "python": clean(str(launch.get("python") or "")),
        "versions": clean(", ".join(f"{name} {version}" for name, version in versions.items())),
        "command": clean(without_secrets(" ".join(map(str, command)))) if isinstance(command, list) else "",
    }


def _sensible(seconds: Any) -> bool:
    return isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds < 2**33


def _slow(history: History) -> list[tuple[str, int, int]]:
    """(what was said of a rank, how often, at which step last), most often first."""
    found: dict[str, tuple[str, int, int]] = {}
    for event in history.events:
        if event.kind == "slow_rank":
            text = event.text.partition(": ")[2] or event.text
            rank = " ".join(text.split()[:4]) + (" waits" if "waits" in text else " slow")
            found[rank] = (text, found.get(rank, ("", 0, 0))[1] + 1, event.step)
    return sorted(found.values(), key=lambda one: -one[1])[:MOST_LINES]


def _marks(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(character, meaning) of the kinds of events that the timeline shows."""
    kinds = {event.kind for run in runs for event in run.history.events}
    return list(dict.fromkeys(mark[1:] for kind, mark in charts.MARKS.items() if kind in kinds))


def _headers(runs: Sequence[Run]) -> list[tuple[str, list[str], Any]]:
    """(recipe, letters of its runs, its header) of each recipe of this package."""
    found: dict[str, tuple[str, list[str], Any]] = {}
    for number, run in enumerate(runs):
        if run.header is not None:
            found.setdefault(run.header[0], (run.header[0], [], run.header[1]))[1].append(charts.letter(number))
    return list(found.values())


def _figures(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each protocol, metric and pool: the newest figure of each run, and what its recipe expects."""
    keys: dict[tuple[str, str, str], list[str]] = {}
    for run in runs:
        for one in run.results["figures"]:
            keys.setdefault((one["protocol"], one["metric"], one["pool"]), [])
        for one in run.results["expected"]:
            key = (one["protocol"], one["metric"], one.get("pool") or "")
            if not any(key[:2] == known[:2] for known in keys):
                keys.setdefault(key, [])
    rows = []
    for protocol, metric, pool in keys:
        cells = []
        for run in runs:
            fit = [
                f for f in run.results["figures"] if (f["protocol"], f["metric"], f["pool"]) == (protocol, metric, pool)
            ]
            newest = max(fit, key=lambda f: -1 if f["step"] is None else f["step"], default=None)
            expected = next(
                (e for e in run.results["expected"] if (e["protocol"], e["metric"]) == (protocol, metric)), None
            )
            if expected is not None and pool and expected.get("pool") not in (None, "", pool):
                expected = None
            cells.append({"figure": clean(newest), "expected": clean(expected)})
        rows.append(
            {
                "protocol": clean(protocol),
                "metric": clean(metric),
                "pool": clean(pool),
                "cells": cells,
                "expected": _expected(cells),
            }
        )
    return rows


def _expected(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the recipes expect, each value once; with letters of the runs where they do not all expect the same."""
    found: dict[str, list[str]] = {}
    for number, cell in enumerate(cells):
        if cell["expected"]:
            words = f"{cell['expected']['expected']:.1f} ({cell['expected']['source']})"
            found.setdefault(words, []).append(charts.letter(number))
    same = len(found) == 1 and len(next(iter(found.values()))) == len(cells)
    return [words if same else f"{', '.join(letters)}: {words}" for words, letters in found.items()]


def _other_options(rows: Sequence[Mapping[str, Any]], runs: int) -> list[tuple[str, list[str]]]:
    """(options that are not the published ones, the figures that have them): a line each."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for number, cell in enumerate(row["cells"]):
            if cell["figure"] and cell["figure"]["changed"]:
                name = row["protocol"] if row["metric"] == row["protocol"] else f"{row['protocol']} {row['metric']}"
                words = name if runs == 1 else f"{charts.letter(number)} {name}"
                found.setdefault("; ".join(cell["figure"]["changed"]), {})[words] = None
    return [(words, list(of)) for words, of in found.items()]


def _kinds(run: Run) -> dict[str, str]:
    """Kind of a panel's row -> its name on the page."""
    policy = run.recipe.get("method.masking.policy")
    drawn_by = {"attention": "teacher's attention", "topk": "teacher's attention", "amt": "stored importance (AMT)"}
    return {
        "masked": "what the student sees",
        "attention": drawn_by.get(str(policy), "attention that drew the mask"),
        "student attention": "student's attention",
        "features": "student's features, 3 components",
    }


def _value(value: Any) -> str:
    """As YAML would have it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
