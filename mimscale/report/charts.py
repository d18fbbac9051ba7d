"""The curves of runs as bokeh figures, each run with a letter, a colour and a dash of its own; needs bokeh.

The columns `step`, `samples` and `hours` of every source are the x axes that the page switches between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mimscale.report import thin
from mimscale.report.runs import Run
from mimscale.runs.history import EVALS, Event, Row, columns

AXES = ("step", "samples", "hours")
COLOURS = ("#3a80c2", "#d46a1f", "#26966a", "#b95f9c", "#a88000", "#7a6fd0", "#4d7f8f", "#c2514f")
"""Each at least 3:1 against the page in light and in dark."""
DASHES = ((), (8, 4), (2, 3), (9, 3, 2, 3), (16, 4))
MARKS = {  # kind of event -> (marker of bokeh, the same as a character, in words)
    "start": ("triangle", "▲", "start or restart"),
    "restart": ("triangle", "▲", "start or restart"),
    "saved": ("circle", "●", "checkpoint saved"),
    "save_failed": ("circle_x", "⊗", "save failed or left out"),
    "save_skipped": ("circle_x", "⊗", "save failed or left out"),
    "rollback": ("inverted_triangle", "▼", "roll-back"),
    "skipped": ("x", "✕", "step skipped"),
    "evals": ("diamond", "◆", "evaluation"),
    "evals_failed": ("diamond_cross", "◈", "evaluation failed"),
    "slow_rank": ("asterisk", "✱", "a rank was slow, or waited for data"),
    "damaged": ("cross", "✚", "sample could not be used"),
    "stopped": ("square", "■", "stopped"),
}
MOST_MARKS = 200
"""Of one kind, run and chart."""


class Metric(NamedTuple):
    """title: of the chart, with its unit. format: of numbers, for `str.format`. axis: of the y axis, for numeral.js."""

    title: str
    format: str = "{:,.4g}"
    axis: str = ""
    group: str = "more"


METRICS = {
    "loss": Metric("Loss", group="training"),
    "lr": Metric("Learning rate", "{:.3g}", group="training"),
    "grad_norm": Metric("Gradient norm", group="training"),
    "loss_scale": Metric("Loss scale", "{:,g}", group="training"),
    "images_per_s": Metric("Throughput, images/s", "{:,.0f}", "0,0", group="speed"),
    "mfu": Metric("MFU, share of the device's peak", "{:.1%}", "0.[0]%", group="speed"),
    "mfu_measured": Metric("MFU, share of a measured product", "{:.1%}", "0.[0]%", group="speed"),
    "data_wait": Metric("Time spent waiting for data", "{:.1%}", "0.[0]%", group="speed"),
    "memory_gib": Metric("Peak memory, GiB", "{:,.2f}", group="speed"),
    "memory_reserved_gib": Metric("Peak reserved memory, GiB", "{:,.2f}", group="speed"),
    "host_share": Metric("Host's share of the forward pass", "{:.1%}", "0.[0]%", group="speed"),
    "power_w": Metric("Power, W", "{:,.0f}", group="speed"),
    EVALS + "rankme": Metric("RankMe", "{:.2f}", group="evals"),
    EVALS + "spread": Metric("Spread of features", "{:.3f}", group="evals"),
}
LEFT_OUT = ("epoch", "skipped_steps", "damaged")
"""They stand in tables."""
MOST_CHARTS = 24


@dataclass(frozen=True)
class Chart:
    """figure: of bokeh. rows: for each run that has the metric, letter and (first, lowest, highest, last) in words."""

    name: str
    metric: Metric
    figure: Any
    rows: Sequence[tuple[str, tuple[str, ...]]]


def letter(number: int) -> str:
    """A, B, ..., Z, A1, ..."""
    return chr(ord("A") + number % 26) + (str(number // 26) if number >= 26 else "")


def metric_of(name: str) -> Metric:
    if name in METRICS:
        return METRICS[name]
    if name.startswith(EVALS):
        return Metric(f"{name.removeprefix(EVALS)}, %", "{:.1f}", group="evals")
    return Metric(name)


def metric_names(runs: Sequence[Run]) -> list[str]:
    """Those that are drawn: the known ones first."""
    found = dict.fromkeys(name for run in runs for name in columns(run.history.rows))
    found |= dict.fromkeys(name for run in runs for name in columns(run.history.evals))
    known = [name for name in METRICS if name in found]
    return [*known, *(name for name in found if name not in known and name not in LEFT_OUT)][:MOST_CHARTS]


def values_of(run: Run, name: str) -> list[Row]:
    rows = run.history.evals if name.startswith(EVALS) else run.history.rows
    return [row for row in rows if name in row.values]


def constant(runs: Sequence[Run], name: str) -> bool:
    """Whether no run has two different values of it, and there are several."""
    of_runs = [{row.values[name] for row in values_of(run, name)} for run in runs]
    return all(len(values) <= 1 for values in of_runs) and any(len(values_of(run, name)) > 1 for run in runs)


def in_words(metric: Metric, value: float) -> str:
    return metric.format.format(value) if math.isfinite(value) else "not finite"


def ends(runs: Sequence[Run]) -> dict[str, tuple[float, float]]:
    """Axis -> where it begins and ends; without samples where no recipe says the global batch."""
    found = {}
    for axis in AXES:
        lasts = [x for run in runs for x in _x(run, run.history.rows + run.history.evals)[axis] if math.isfinite(x)]
        lasts += [x for run in runs for x in _x(run, run.history.events)[axis] if math.isfinite(x)]
        if lasts and max(lasts) > 0:
            found[axis] = (-0.01 * max(lasts), 1.07 * max(lasts))
    return found or {"step": (0.0, 1.0)}


def make(runs: Sequence[Run]) -> tuple[Any, list[Chart], dict[str, str]]:
    """(the timeline of events, the charts, metric -> its value in words where it never changes)."""
    from bokeh.models import Range1d

    start, end = ends(runs).get("step", (0.0, 1.0))
    shared = Range1d(start=start, end=end)
    charts, unchanged = [], {}
    for name in metric_names(runs):
        metric = metric_of(name)
        if constant(runs, name):
            words = [
                f"{letter(n)} {in_words(metric, rows[-1].values[name])}"
                for n, run in enumerate(runs)
                if (rows := values_of(run, name))
            ]
            only = {word.split(" ", 1)[1] for word in words}
            unchanged[metric.title] = only.pop() if len(only) == 1 else ", ".join(words)
        else:
            charts.append(_chart(runs, name, shared))
    return _timeline(runs, shared), charts, unchanged


def _chart(runs: Sequence[Run], name: str, shared: Any) -> Chart:
    from bokeh.models import HoverTool, NumeralTickFormatter, PrintfTickFormatter

    metric = metric_of(name)
    figure = _figure(shared, height=210)
    if metric.axis:
        figure.yaxis.formatter = NumeralTickFormatter(format=metric.axis)
    elif name == "lr":
        figure.yaxis.formatter = PrintfTickFormatter(format="%.1e")
    drawn, table, ends_at = [], [], list[tuple[int, Run, Row, float]]()
    for number, run in enumerate(runs):
        rows = values_of(run, name)
        if not rows:
            continue
        table.append((letter(number), _extremes(metric, name, rows)))
        colour, dash = COLOURS[number % len(COLOURS)], list(DASHES[number % len(DASHES)])
        for gone in run.history.discarded:
            old = [row for row in gone if name in row.values]
            if old:
                source, _ = _sources(run, name, old)
                figure.line("step", "y", source=source, color=colour, line_width=1.4, line_dash=[2, 2], alpha=0.75)
        source, means = _sources(run, name, rows)
        options = {"color": colour, "name": letter(number)}
        if means is None:
            drawn.append(figure.line("step", "y", source=source, line_width=1.8, line_dash=dash, **options))
        else:
            drawn.append(figure.line("step", "y", source=source, line_width=1, alpha=0.35, **options))
            figure.line("step", "y", source=means, line_width=2.2, line_dash=dash, **options)
        if len(rows) <= 25:
            figure.scatter("step", "y", source=source, color=colour, size=4)
        if finite := [row for row in rows if math.isfinite(row.values[name])]:
            at = finite[-1].values[name] if means is None else float(means.data["y"][-1])
            ends_at.append((number, run, finite[-1], at))
        if name == "loss":
            _marks_skipped(figure, run, rows)
        _marks_restarts(figure, run)
    _letters(figure, ends_at)
    tip = [("run", "$name"), ("step", "@step{0,0}"), ("hours", "@hours{0.00}"), (metric.title, "@y{0.[0000]a}")]
    if metric.axis:
        tip[-1] = (metric.title, f"@y{{{metric.axis}}}")
    elif name == "lr" or metric.group == "more":
        tip[-1] = (metric.title, "@y")
    figure.add_tools(HoverTool(renderers=drawn, tooltips=tip, mode="vline" if len(drawn) == 1 else "mouse"))
    return Chart(name, metric, figure, table)


def _extremes(metric: Metric, name: str, rows: Sequence[Row]) -> tuple[str, ...]:
    finite = [row for row in rows if math.isfinite(row.values[name])] or list(rows[-1:])
    low, high = (choose(finite, key=lambda row: row.values[name]) for choose in (min, max))
    points = [rows[0], low, high, rows[-1]]
    return tuple(f"{in_words(metric, row.values[name])} (step {row.step:,})" for row in points)


def _timeline(runs: Sequence[Run], shared: Any) -> Any:
    from bokeh.models import ColumnDataSource, HoverTool

    letters = [letter(number) for number in range(len(runs))]
    figure = _figure(shared, height=64 + 26 * len(runs), y_range=letters[::-1])
    figure.ygrid.visible = False
    drawn = []
    for number, run in enumerate(runs):
        events = run.history.events
        for kind in dict.fromkeys(event.kind for event in events if event.kind in MARKS):
            of_kind = [event for event in events if event.kind == kind]
            of_kind = of_kind[:: -(-len(of_kind) // MOST_MARKS)]
            data = {**_x(run, of_kind), "y": [letter(number)] * len(of_kind), "what": [e.text for e in of_kind]}
            drawn.append(
                figure.scatter(
                    "step",
                    "y",
                    source=ColumnDataSource(data),
                    marker=MARKS[kind][0],
                    size=8 if kind in ("saved", "evals") else 11,
                    color=COLOURS[number % len(COLOURS)],
                    fill_alpha=0.35,
                    line_width=1.5,
                )
            )
    tip = [("run", "@y"), ("step", "@step{0,0}"), ("hours", "@hours{0.00}"), ("what", "@what")]
    figure.add_tools(HoverTool(renderers=drawn, tooltips=tip))
    return figure


def _figure(shared: Any, height: int, **options: Any) -> Any:
    from bokeh.models import BasicTicker, BoxZoomTool, NumeralTickFormatter
    from bokeh.plotting import figure

    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        x_range=shared,
        tools="",
        toolbar_location=None,
        min_border_left=56,
        min_border_right=8,
        **options,
    )
    plot.add_tools(BoxZoomTool(dimensions="width"))
    plot.xaxis.formatter = NumeralTickFormatter(format="0.[0]a")
    plot.xaxis.ticker = BasicTicker(desired_num_ticks=6)
    if "y_range" not in options:
        plot.yaxis.ticker = BasicTicker(desired_num_ticks=4)
    for axis in plot.axis:
        axis.major_label_text_font_size = "11px"
        axis.minor_tick_line_color = None
        axis.major_tick_in = 0
        axis.major_tick_out = 4
    plot.background_fill_color = plot.border_fill_color = plot.outline_line_color = None
    return plot


def _x(run: Run, of: Sequence[Row] | Sequence[Event]) -> dict[str, list[float]]:
    batch = run.recipe.get("schedule.global_batch")
    per_step = float(batch) if isinstance(batch, int) else math.nan
    steps = [float(one.step) for one in of]
    return {"step": steps, "samples": [step * per_step for step in steps], "hours": [one.hours for one in of]}


def _sources(run: Run, name: str, rows: Sequence[Row]) -> tuple[Any, Any | None]:
    """(the thinned curve, means over it where it is long), in fp32: what is drawn needs no more."""
    from bokeh.models import ColumnDataSource

    steps = np.array([row.step for row in rows], dtype=np.float64)
    y = np.array([row.values[name] for row in rows], dtype=np.float64)

    def source(indices: NDArray[np.int64], values: NDArray[np.float64]) -> Any:
        x = _x(run, [rows[index] for index in indices])
        data = {axis: np.array(of_axis, dtype=np.float32) for axis, of_axis in x.items()}
        return ColumnDataSource(data | {"y": values.astype(np.float32)})

    chosen, (middles, means) = thin.kept(steps, y), thin.means(steps, y)
    return source(chosen, y[chosen]), source(middles, means) if len(middles) else None


def _letters(figure: Any, ends_at: Sequence[tuple[int, Run, Row, float]]) -> None:
    """At the end of each curve the letter of its run; beside each other where curves end in the same place.

    ends_at: number of the run, the run, its last row, and the height of the curve there.
    """
    from bokeh.models import ColumnDataSource

    lasts = [end.step for _, _, end, _ in ends_at]
    heights = [height for *_, height in ends_at]
    near_x, near_y = 0.04 * max(lasts, default=0), 0.08 * (max(heights, default=0.0) - min(heights, default=0.0))
    placed: list[tuple[int, float]] = []
    for number, run, last, height in ends_at:
        before = sum(abs(last.step - x) <= near_x and abs(height - y) <= near_y for x, y in placed)
        placed.append((last.step, height))
        data: Mapping[str, Any] = {**_x(run, [last]), "y": [height], "text": [letter(number)]}
        figure.text(
            "step",
            "y",
            text="text",
            source=ColumnDataSource(data),
            x_offset=5 + 10 * before,
            text_baseline="middle",
            text_font_size="12px",
            text_font_style="bold",
            text_color=COLOURS[number % len(COLOURS)],
        )


def _marks_skipped(figure: Any, run: Run, rows: Sequence[Row]) -> None:
    """At the height of the curve, because the loss of a skipped step may be no number."""
    from bokeh.models import ColumnDataSource

    events = [event for event in run.history.events if event.kind == "skipped"][:MOST_MARKS]
    finite = [row for row in rows if math.isfinite(row.values["loss"])]
    if events and finite:
        steps, losses = [row.step for row in finite], [row.values["loss"] for row in finite]
        y = np.interp([event.step for event in events], steps, losses)
        figure.scatter(
            "step", "y", source=ColumnDataSource({**_x(run, events), "y": y}), marker="x", size=9, name="ink"
        )


def _marks_restarts(figure: Any, run: Run) -> None:
    """A vertical line for each: dashed where the run was started again, dotted where it was rolled back."""
    from bokeh.models import ColumnDataSource

    for kind, dash in (("restart", [5, 4]), ("rollback", [1, 3])):
        events = [event for event in run.history.events if event.kind == kind][-MOST_MARKS:]
        if events:
            figure.vspan(x="step", source=ColumnDataSource(_x(run, events)), line_dash=dash, line_width=1, name="ink")
