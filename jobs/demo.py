"""Teacher -> masked students -> frozen-feature accuracy, on real handwritten digits. See README, "Demo".

Every stage is one command of the project, the first line of its log. Training that is done is not done again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mimscale.run_folder import git_commit

ROOT = Path(__file__).resolve().parent.parent
DEVICE = os.environ.get("DEMO_DEVICE", "cpu")
RANKS = 2 if DEVICE == "cpu" else min(2, max(1, torch.cuda.device_count()))
RUNS = ("teacher", "mae", "control", "maskalign")
ROWS = {  # network in the reports -> (title, what it saw before the test)
    "raw pixels": ("raw pixels", "no network"),
    "random init": ("random initialisation", "nothing"),
    "teacher": ("teacher, transferred", "4,000 MNIST digits with labels"),
    "mae": ("MAE", "1,297 digits without labels"),
    "control": ("MaskAlign, random teacher", "1,297 digits without labels"),
    "maskalign": ("MaskAlign", "1,297 digits without labels, and the teacher"),
}
METRICS = {"knn": "kNN", "linear": "linear", "few_shot": "5-shot"}
OVER_RANDOM, OVER_CONTROL = 12.0, 8.0  # points that MaskAlign has to be ahead in kNN and with 5 labels per class
console = Console(highlight=False)


# ------------------------------------------------------------------------------------------------ stages


class Stages:
    """Runs commands one after the other, each with its time; their output goes to log files."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        logs.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, *words: object, ranks: int = 0) -> None:
        """python WORDS, or `ranks` of them under torchrun. The demo ends here if the command fails."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
        command = [sys.executable, *launcher, *map(str, words)]
        log = self.logs / f"{name.replace(' ', '-').replace(',', '')}.log"
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
        start_s = time.monotonic()
        with log.open("w") as file, console.status(name) as status:
            file.write(f"$ {' '.join(command)}\n")
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                if line.strip():
                    status.update(f"{name}  [dim]{line.strip()[:100]}[/dim]")
            code = process.wait()
        if code:
            console.print(f"[red]failed[/red]  {name} (exit code {code}), {log} ends with:", soft_wrap=True)
            console.print("".join(log.read_text().splitlines(keepends=True)[-15:]), markup=False)
            raise SystemExit(1)
        console.print(f"[green]done[/green] {time.monotonic() - start_s:6.1f} s  {name}", soft_wrap=True)


def prepare(out: Path, stage: Stages) -> dict[str, Path]:
    """Shards of MNIST with labels, and of scikit-learn's digits: without labels to train on, with labels to test."""
    wanted = {
        "mnist": ("mnist/train", ()),
        "digits-unlabelled": ("digits/train", ("--unlabelled",)),
        "digits-train": ("digits/train", ()),
        "digits-test": ("digits/test", ()),
    }
    shards = {name: out / "shards" / name for name in wanted}
    missing = [name for name, folder in shards.items() if not (folder / "manifest.json").is_file()]
    if missing:
        pictures = out / "pictures"
        shutil.rmtree(pictures, ignore_errors=True)
        stage("data: pictures", "-m", "data_prep", "digits", pictures)
        for name in missing:
            source, flags = wanted[name]
            stage(f"data: shards {name}", "-m", "data_prep", "folder", pictures / source, shards[name], *flags)
    return shards


def pretrain(folder: Path, seed: int, shards: Mapping[str, Path], stage: Stages) -> None:
    """The teacher, then the three students."""
    common = [f"seed={seed}", f"engine.device={DEVICE}"]
    if DEVICE == "cuda":
        common += ["engine.ds_config=zero2_bf16", "data.workers=4"]

    def train(title: str, recipe: str, name: str, data: str, *overrides: str) -> None:
        words = ["-m", "mimscale", "train", recipe, "--run-dir", folder / name, f"data.shards={shards[data]}"]
        stage(f"seed {seed}: {title}", *words, *common, *overrides, ranks=RANKS)

    train("teacher on MNIST, with labels", "demo_teacher", "teacher", "mnist")
    weights = folder / "teacher.safetensors"
    if not weights.exists():
        stage(
            f"seed {seed}: teacher exported", "-m", "mimscale", "convert", folder / "teacher", weights, "--to", "timm"
        )
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    teacher = [f"teachers.mnist.weights={weights}", f"teachers.mnist.sha256={sha256}"]
    train("MaskAlign, no labels", "demo_maskalign", "maskalign", "digits-unlabelled", *teacher)
    random = ["teachers.mnist.weights=null", "teachers.mnist.random=true"]
    train("control: a random teacher", "demo_maskalign", "control", "digits-unlabelled", *random)
    train("MAE, no labels", "demo_mae", "mae", "digits-unlabelled")


def evaluate(folder: Path, seed: int, shards: Mapping[str, Path], stage: Stages) -> dict[str, dict[str, float]]:
    """Percent right on the 500 test digits: network -> metric -> value. One process per protocol for all networks."""
    runs = [folder / name for name in RUNS]
    common = ["--train", shards["digits-train"], "--val", shards["digits-test"], "--crop-pct", 1, "--workers", 0]
    common += ["--seed", seed, "--device", DEVICE]
    scores: dict[str, dict[str, float]] = {name: {} for name in ROWS}
    for protocol, flags in (("knn", []), ("linear", ["--shots", 5, "--draws", 3])):
        report = folder / f"{protocol}.json"
        words = ["-m", "mimscale", "evaluate", protocol, *runs, *common, *flags, "--out", report]
        stage(f"seed {seed}: evaluate {protocol}", *words)
        for row in json.loads(report.read_text())["rows"]:
            scores[row["network"]] |= {metric: row[metric] for metric in METRICS if metric in row}
    return scores


# ------------------------------------------------------------------------------------------------ results


def mean(scores: Sequence[dict[str, dict[str, float]]], network: str, metric: str) -> float:
    return statistics.fmean(of_seed[network][metric] for of_seed in scores)


def cells(scores: Sequence[dict[str, dict[str, float]]]) -> list[list[str]]:
    """One line per network: title, what it saw, and mean (± standard deviation over seeds) of each metric."""
    lines = []
    for network, (title, saw) in ROWS.items():
        line = [title, saw]
        for metric in METRICS:
            values = [of_seed[network][metric] for of_seed in scores]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            line.append(f"{statistics.fmean(values):.1f}{spread}")
        lines.append(line)
    return lines


def findings(scores: Sequence[dict[str, dict[str, float]]]) -> list[str]:
    """What the numbers say, whichever way they fall."""

    def compare(first: str, second: str) -> str:
        gaps = [(m, mean(scores, first, m) - mean(scores, second, m)) for m in ("knn", "few_shot")]
        told = " and ".join(f"{gap:+.1f} points in {METRICS[m]}" for m, gap in gaps)
        return f"{ROWS[first][0]} against {ROWS[second][0]}: {told}."

    pairs = (("maskalign", "random init"), ("maskalign", "control"), ("maskalign", "teacher"))
    return [compare(*pair) for pair in (*pairs, ("mae", "random init"), ("maskalign", "raw pixels"))]


def failures(scores: Sequence[dict[str, dict[str, float]]], scale: float) -> list[str]:
    """Margins that are not reached."""
    out = []
    for other, points in (("random init", OVER_RANDOM), ("control", OVER_CONTROL)):
        for metric in ("knn", "few_shot"):
            margin = mean(scores, "maskalign", metric) - mean(scores, other, metric)
            if not margin > points * scale:
                out.append(f"{METRICS[metric]}: MaskAlign is {margin:.1f} points over {other}, not {points * scale:g}")
    return out


def caption(seeds: int) -> str:
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{RANKS} processes on a CPU"
    over = f"Mean ± standard deviation over {seeds} seeds" if seeds > 1 else "One seed"
    commit = git_commit() or "unknown"
    changed = " with changes" if commit.endswith("+") else ""
    return (
        "Percent of 500 of scikit-learn's digits that are classified right; no network and no probe saw these. "
        "Features are the mean of the frozen network's patch tokens. kNN and linear learn from the labels of the other "
        f"1,297 digits, 5-shot from 5 labels per class (mean of 3 draws). {over}; `bash jobs/demo.sh`, {where}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, commit {commit[:12]}{changed}."
    )


def publish(out: Path, scores: Sequence[dict[str, dict[str, float]]], seconds: float) -> None:
    """The table on the terminal, in demo.md and, with the single values, in demo.json."""
    headings = ["network", "has seen", *METRICS.values()]
    table = Table(title="top-1 in percent, frozen features")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < 2 else "right")
    lines = cells(scores)
    for line in lines:
        table.add_row(*line, style="bold" if line[0] == "MaskAlign" else None)
    console.print(table)
    markdown = [headings, ["---", "---", *("---:" for _ in METRICS)], *lines]
    told = "\n".join(f"- {finding}" for finding in findings(scores))
    text = "\n".join(f"| {' | '.join(line)} |" for line in markdown)
    (out / "demo.md").write_text(f"{text}\n\n{caption(len(scores))}\n\n{told}\n")
    console.print(f"{caption(len(scores))}\n{told}")
    report = {"caption": caption(len(scores)), "seconds": round(seconds, 1), "scores": list(scores)}
    (out / "demo.json").write_text(json.dumps(report, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------ command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 where a stage fails or, with --check, where a margin is not reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="repeat all of it with seeds 0, 1, ... (default 1)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo", help="folder (default runs/demo)")
    check = (
        f"fail unless MaskAlign is SCALE x {OVER_RANDOM:g} points over random and x {OVER_CONTROL:g} over its control"
    )
    parser.add_argument("--check", type=float, metavar="SCALE", help=check)
    args = parser.parse_args(arguments)
    out, start_s = args.out.resolve(), time.monotonic()

    stage = Stages(out / "logs")
    shards = prepare(out, stage)
    scores = []
    for seed in range(args.seeds):
        folder = out / f"seed-{seed}"
        pretrain(folder, seed, shards, stage)
        scores.append(evaluate(folder, seed, shards, stage))
    stage("picture", ROOT / "jobs" / "demo_picture.py", out / "seed-0", shards["digits-test"], out / "demo.png")
    publish(out, scores, time.monotonic() - start_s)
    console.print(
        f"{time.monotonic() - start_s:.0f} s in all. {out}: demo.md, demo.json, demo.png, logs/", soft_wrap=True
    )
    console.print(f"curves: tensorboard --logdir {out}", soft_wrap=True)
    missed = failures(scores, args.check) if args.check is not None else []
    for line in missed:
        console.print(f"[red]not reached[/red]  {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
