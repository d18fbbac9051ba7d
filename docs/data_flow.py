"""Draws docs/data_flow.svg, the diagram of the README:  python docs/data_flow.py   (needs matplotlib, extra [demo])

The diagram has a light panel of its own, so that it reads the same on a light and on a dark page.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

OUT = Path(__file__).with_suffix(".svg")
WIDTH, HEIGHT = 10.85, 5.25  # inches; one unit of the axes is one inch
PANEL, INK, MUTED, EDGE = "#f6f8fa", "#1f2328", "#59636e", "#8c959f"
STORED, RUNS = "#ffeccb", "#d6e6fb"  # what lies on a disk, what computes
BOX_WIDTH, BOX_HEIGHT = 1.6, 1.0
COLUMNS = (0.3, 2.4, 4.6, 6.75, 8.85)  # left edges
ROWS = (0.55, 2.2, 3.85)  # lower edges

BOXES = {  # name -> (column, row, colour, lines below the name)
    "Images": (0, 2, STORED, ("folder, archive,", "parquet")),
    "data_prep": (0, 1, RUNS, ("shuffle, write,", "verify")),
    "Tar shards": (0, 0, STORED, ("and a manifest, on", "disk, http, S3, GCS")),
    "Loader": (1, 0, RUNS, ("order, decode,", "crop, noise")),
    "Teachers": (2, 1, RUNS, ("frozen; bf16, fp16,", "int8 or fp8")),
    "Method": (2, 0, RUNS, ("masking, student,", "heads, loss")),
    "Engine": (3, 0, RUNS, ("DeepSpeed,", "ZeRO 0 to 3")),
    "Monitoring": (3, 1, RUNS, ("metrics, panels,", "TensorBoard")),
    "Recipe": (2, 2, STORED, ("one YAML file and", "key=value changes")),
    "Checkpoint": (4, 0, STORED, ("for any ranks and", "any ZeRO stage")),
    "Evaluation": (4, 1, RUNS, ("of frozen", "features")),
    "Conversion": (4, 2, RUNS, ("timm and", "official names")),
}
FRAME = "mimscale train: one process per GPU"
LABELS = ("Batch", "images", "Targets", "loss")
LEGEND = {"stored data": STORED, "program": RUNS}


def left(name: str) -> float:
    return COLUMNS[BOXES[name][0]]


def lower(name: str) -> float:
    return ROWS[BOXES[name][1]]


def draw_box(axes: Axes, name: str) -> None:
    _, _, colour, lines = BOXES[name]
    x, y = left(name), lower(name)
    style = "round,pad=0,rounding_size=0.1"
    axes.add_patch(FancyBboxPatch((x, y), BOX_WIDTH, BOX_HEIGHT, style, facecolor=colour, edgecolor=EDGE, linewidth=1))
    middle = x + BOX_WIDTH / 2
    axes.text(middle, y + 0.76, name, ha="center", va="center", fontsize=11.5, fontweight="bold", color=INK)
    for line, height in zip(lines, (0.46, 0.22), strict=True):
        axes.text(middle, y + height, line, ha="center", va="center", fontsize=9.5, color=INK)


def arrow(axes: Axes, *points: tuple[float, float], both: bool = False) -> None:
    """A line through the points with a head at its end, or at both ends."""
    for start, end in zip(points[:-2], points[1:-1], strict=True):
        axes.plot(*zip(start, end, strict=True), color=MUTED, linewidth=1.4, solid_capstyle="butt")
    head = {"arrowstyle": "<|-|>" if both else "-|>", "color": MUTED, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=points[-1], xytext=points[-2], arrowprops=head | {"mutation_scale": 13})


def label(axes: Axes, x: float, y: float, text: str, side: str = "center") -> None:
    assert text in LABELS
    axes.text(x, y, text, ha=side, va="center", fontsize=9.5, fontstyle="italic", color=MUTED)


def between(axes: Axes, first: str, second: str, text: str = "", both: bool = False) -> None:
    """An arrow from one box to its neighbour in the same row or column."""
    if lower(first) == lower(second):
        y, start, end = lower(first) + BOX_HEIGHT / 2, left(first) + BOX_WIDTH, left(second)
        arrow(axes, (start, y), (end, y), both=both)
        if text:
            label(axes, (start + end) / 2, y + 0.17, text)
        return
    x, up = left(first) + BOX_WIDTH / 2, lower(second) > lower(first)
    start, end = lower(first) + (BOX_HEIGHT if up else 0), lower(second) + (0 if up else BOX_HEIGHT)
    arrow(axes, (x, start), (x, end))
    if text:
        label(axes, x + 0.08, (start + end) / 2, text, "left")


def draw(axes: Axes) -> None:
    panel = {"facecolor": PANEL, "edgecolor": "#d1d9e0", "linewidth": 1}
    axes.add_patch(FancyBboxPatch((0.05, 0.05), WIDTH - 0.1, HEIGHT - 0.1, "round,pad=0,rounding_size=0.15", **panel))
    x, y = COLUMNS[1] - 0.2, ROWS[0] - 0.25
    width, height = COLUMNS[3] + BOX_WIDTH + 0.2 - x, ROWS[1] + BOX_HEIGHT + 0.18 - y
    frame = {"facecolor": "#ffffff", "edgecolor": MUTED, "linewidth": 1, "linestyle": (0, (4, 3))}
    axes.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.12", **frame))
    axes.text(x + 0.02, y + height + 0.17, FRAME, ha="left", va="center", fontsize=10, color=INK)

    for name in BOXES:
        draw_box(axes, name)
    between(axes, "Images", "data_prep")
    between(axes, "data_prep", "Tar shards")
    between(axes, "Tar shards", "Loader")
    between(axes, "Loader", "Method", "Batch")
    between(axes, "Teachers", "Method", "Targets")
    between(axes, "Method", "Engine", "loss")
    between(axes, "Engine", "Monitoring")
    between(axes, "Engine", "Checkpoint", both=True)
    between(axes, "Checkpoint", "Evaluation")
    corner = lower("Teachers") + BOX_HEIGHT / 2
    up = left("Loader") + BOX_WIDTH / 2
    arrow(axes, (up, ROWS[0] + BOX_HEIGHT), (up, corner), (left("Teachers"), corner))
    label(axes, up - 0.05, corner + 0.17, "images", "left")
    for (meaning, colour), at_y in zip(LEGEND.items(), (4.62, 4.32), strict=True):
        at = COLUMNS[1] - 0.02
        axes.add_patch(FancyBboxPatch((at, at_y), 0.2, 0.16, "square,pad=0", facecolor=colour, edgecolor=EDGE))
        axes.text(at + 0.3, at_y + 0.08, meaning, ha="left", va="center", fontsize=9.5, color=INK)
    # to the frame as a whole, and past the evaluation
    arrow(axes, (left("Recipe") + BOX_WIDTH / 2, ROWS[2]), (left("Recipe") + BOX_WIDTH / 2, y + height))
    beside = left("Checkpoint") + BOX_WIDTH + 0.2
    side = lower("Checkpoint") + BOX_HEIGHT / 2, lower("Conversion") + BOX_HEIGHT / 2
    edge = left("Checkpoint") + BOX_WIDTH
    arrow(axes, (edge, side[0]), (beside, side[0]), (beside, side[1]), (edge, side[1]))


def main() -> None:
    settings = {"svg.hashsalt": "data_flow", "svg.fonttype": "path", "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(settings):
        figure = pyplot.figure(figsize=(WIDTH, HEIGHT))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        axes.axis("off")
        draw(axes)
        figure.savefig(OUT, transparent=True, metadata={"Date": None})
        pyplot.close(figure)


if __name__ == "__main__":
    main()
