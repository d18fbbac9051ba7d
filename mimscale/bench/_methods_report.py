"""The table of `mimscale bench methods`: means with confidence intervals, differences, rankings of papers."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import t as student_t

from mimscale.bench._methods_rows import CLAIMS, ROWS, Preset
from mimscale.bench._report import origin, table
from mimscale.files.atomic import atomic_write
from mimscale.files.command_line import plain, print_json

METRICS = {
    "knn": "kNN",
    "linear": "linear",
    "attentive": "attentive",
    "lowshot": "1 % of the labels",
    "finetune": "fine-tuned",
}
CONFIDENCE = 0.95
Scores = Mapping[str, Mapping[int, Mapping[str, float]]]  # row -> seed -> metric -> percent


class Interval(NamedTuple):
    """mean and half width, of Student's t at CONFIDENCE; NaN for one value. seeds: how many."""

    mean: float
    half: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + (f" ± {self.half:.1f}" if self.seeds > 1 else " (1 seed)")


def interval(values: Sequence[float]) -> Interval:
    count = len(values)
    if count < 2:
        return Interval(values[0], math.nan, count)
    half = student_t.ppf((1 + CONFIDENCE) / 2, count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Interval(statistics.fmean(values), float(half), count)


def difference(scores: Scores, row: str, base: str, metric: str) -> Interval | None:
    """Of the seeds that both have, paired by the seed; None without any."""
    ours, theirs = scores.get(row, {}), scores.get(base, {})
    gaps = [
        ours[seed][metric] - theirs[seed][metric]
        for seed in sorted(ours.keys() & theirs.keys())
        if metric in ours[seed] and metric in theirs[seed]
    ]
    return interval(gaps) if gaps else None


def verdict(gap: Interval | None) -> str:
    """Of a paper's ranking: whether the interval lies above 0, below 0, or holds it."""
    if gap is None:
        return "not measured"
    if gap.seeds < 2:
        return "one seed: no interval"
    if gap.mean - gap.half > 0:
        return "reached"
    return "not reached: the other way round" if gap.mean + gap.half < 0 else "not reached: the interval holds 0"


def load(out: Path) -> tuple[Scores, list[dict[str, Any]]]:
    """(scores, the content of every finished cell)."""
    scores: dict[str, dict[int, dict[str, float]]] = {}
    cells = []
    for name in ROWS:
        for path in sorted((out / "cells" / name).glob("seed-*.json")):
            cell = json.loads(path.read_text())
            cells.append(cell)
            scores.setdefault(name, {})[cell["seed"]] = cell["scores"]
    return scores, cells


def main_table(scores: Scores) -> str:
    present = [metric for metric in METRICS if any(metric in s for row in scores.values() for s in row.values())]
    lines = []
    for name, row in ROWS.items():
        seeds = scores.get(name, {})
        line = [row.title, str(len(seeds))]
        for metric in present:
            values = [of_seed[metric] for of_seed in seeds.values() if metric in of_seed]
            line.append(str(interval(values)) if values else "")
        lines.append(line)
    return table(["row", "seeds", *(METRICS[metric] for metric in present)], lines)


def differences_table(scores: Scores) -> str:
    present = [metric for metric in METRICS if any(metric in s for row in scores.values() for s in row.values())]
    lines = []
    for name, row in ROWS.items():
        for base in row.bases:
            gaps = [difference(scores, name, base, metric) for metric in present]
            if any(gaps):
                lines.append([f"{row.title} - {ROWS[base].title}", *("" if gap is None else f"{gap:}" for gap in gaps)])
    return table(["difference", *(METRICS[metric] for metric in present)], lines)


def claims_table(scores: Scores) -> str:
    lines = []
    for claim in CLAIMS:
        gap = difference(scores, claim.row, claim.base, claim.metric)
        what = f"{ROWS[claim.row].title} > {ROWS[claim.base].title}, {METRICS[claim.metric]}"
        lines.append([what, claim.source, "" if gap is None else str(gap), verdict(gap)])
    return table(["ranking of the paper", "source", "difference here", "here"], lines)


def caption(preset: Preset, cells: Sequence[Mapping[str, Any]]) -> str:
    commits = ", ".join(sorted({cell["commit"] for cell in cells})) or "none"
    devices = ", ".join(sorted({cell["device"] for cell in cells})) or "none"
    spent = sum(cell["seconds"]["all"] for cell in cells)
    return (
        f"Percent of {preset.test:,} test images of Fashion-MNIST, {preset.images:,} training images; ViT of width "
        f"{preset.width} and depth {preset.depth}, patch 4 at 32 px, {preset.steps} pre-training steps and "
        f"{preset.finetune_steps} fine-tuning steps of {preset.batch} images. Frozen features: mean of the patch "
        f"tokens. Mean ± half of the {CONFIDENCE:.0%} interval over seeds (Student's t); differences are paired by "
        f"seed. The test images are the same for all seeds, so the intervals do not hold their choice. Cells of commit "
        f"{commits} on {devices}, {spent:,.0f} s of processes in all. {origin()}"
    )


def publish(out: Path, preset: Preset, as_json: bool = False) -> None:
    """Print the tables, or as_json what methods.json holds; write methods.md and methods.json."""
    scores, cells = load(out)
    text = "\n\n".join([main_table(scores), differences_table(scores), claims_table(scores), caption(preset, cells)])
    atomic_write(out / "methods.md", (text + "\n").encode())
    report = {"preset": preset.__dict__, "caption": caption(preset, cells), "cells": cells}
    report["intervals"] = {
        name: {
            metric: interval([s[metric] for s in row.values() if metric in s])._asdict()
            for metric in METRICS
            if any(metric in s for s in row.values())
        }
        for name, row in scores.items()
    }
    atomic_write(out / "methods.json", (json.dumps(plain(report), indent=1) + "\n").encode())
    if as_json:
        print_json(report)
    else:
        print(text)
