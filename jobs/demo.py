"""Teacher -> masked students -> accuracy of frozen features, on real handwritten digits. See README, "Demo".

Every stage is one command of the project, which is the first line of its log. Finished training is not repeated.
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
from rich.table import Table
from rich.text import Text

from mimscale.checkpoint.run_folder import git_commit
from mimscale.files.console import plain_console

ROOT = Path(__file__).resolve().parent.parent
DEVICE = os.environ.get("DEMO_DEVICE", "cpu")
RANKS = 2 if DEVICE == "cpu" else min(2, max(1, torch.cuda.device_count()))
RUNS = ("teacher", "mae", "control", "maskalign")
ROWS = {  # network in the reports -> (title, its training data)
    "raw pixels": ("raw pixels", "no network"),
    "random init": ("random initialisation", "nothing"),
    "teacher": ("teacher, transferred", "4,000 MNIST digits with labels"),
    "mae": ("MAE", "1,297 digits without labels"),
    "control": ("MaskAlign, random teacher", "1,297 digits without labels"),
    "maskalign": ("MaskAlign", "1,297 digits without labels, and the teacher"),
}
STAGES = "{patches: [2, 2, 2], widths: [24, 48], depths: [1, 1], class_token: true}"
EXTRAS = {  # with --all: network -> (title, recipe, changes)
    "mff": ("MFF", "demo_mae", ("method.name=mff", "method.fusion.levels=[0, 1, 2, 3]")),
    "amt": (
        "MAE, masked by AMT",
        "demo_mae",
        ("method.masking={policy: amt, ratio: 0.45, drop_ratio: 0.3, warmup_epochs: 10, refresh: 0.1}",),
    ),
    "convmae": ("ConvMAE", "demo_mae", ("method.name=convmae", f"method.stages={STAGES}", "student.depth=3")),
    "mrmae": ("MR-MAE", "demo_mrmae", ()),
    "mrmae_convmae": ("MR-MAE on ConvMAE's encoder", "demo_mrmae", (f"method.stages={STAGES}", "student.depth=3")),
}
CONV_RANDOM = "random init ConvViT"
METRICS = {"knn": "kNN", "linear": "linear", "lowshot": "5-shot"}
OVER_RANDOM, OVER_CONTROL = 12.0, 8.0  # required margins of MaskAlign, in points, in kNN and with 5 labels per class
Scores = dict[str, dict[str, float]]  # network -> metric -> percent, of one seed
console = plain_console()


# ------------------------------------------------------------------------------------------------ stages


class Stages:
    """Runs commands one after the other and prints the time of each; their output goes to log files."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        logs.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, *words: object, ranks: int = 0) -> None:
        """Run python WORDS, with ranks > 0 as many processes under torchrun. Exits if the command fails."""
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
                    status.update(Text.assemble(name, "  ", (line.strip()[:100], "dim")))
            code = process.wait()
        if code:
            console.print(
                Text.assemble(("failed", "red"), f"  {name} (exit code {code}), {log} ends with:"), soft_wrap=True
            )
            console.print("".join(log.read_text().splitlines(keepends=True)[-15:]))
            raise SystemExit(1)
        seconds = time.monotonic() - start_s
        console.print(Text.assemble(("done", "green"), f" {seconds:6.1f} s  {name}"), soft_wrap=True)


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
        images = out / "images"
        shutil.rmtree(images, ignore_errors=True)
        stage("data: images", "-m", "data_prep", "digits", images)
        for name in missing:
            source, flags = wanted[name]
            stage(f"data: shards {name}", "-m", "data_prep", "folder", images / source, shards[name], *flags)
    return shards


def rows(extras: bool) -> dict[str, tuple[str, str]]:
    """network in the reports -> (title, its training data)."""
    unlabelled, with_teacher = ROWS["mae"][1], ROWS["maskalign"][1]
    more = {
        n: (title, with_teacher if recipe == "demo_mrmae" else unlabelled) for n, (title, recipe, _) in EXTRAS.items()
    }
    return {**ROWS, CONV_RANDOM: ("ConvMAE's encoder, random", "nothing"), **more} if extras else ROWS


def pretrain(
    folder: Path, seed: int, shards: Mapping[str, Path], stage: Stages, extras: bool, changes: Sequence[str] = ()
) -> None:
    """The teacher, then its students. changes: NAME:section.key=value, for the recipe of one network."""
    common = [f"seed={seed}", f"engine.device={DEVICE}"]
    if DEVICE == "cuda":
        common += ["engine.ds_config=zero2_bf16", "data.workers=4"]

    def train(title: str, recipe: str, name: str, data: str, *overrides: str) -> None:
        words = ["-m", "mimscale", "train", recipe, "--run-dir", folder / name, f"data.shards={shards[data]}"]
        own_changes = [change.removeprefix(f"{name}:") for change in changes if change.startswith(f"{name}:")]
        stage(f"seed {seed}: {title}", *words, *common, *overrides, *own_changes, ranks=RANKS)

    train("teacher on MNIST, with labels", "demo_teacher", "teacher", "mnist")
    exported = folder / "teacher-timm"
    weights = exported / "model.safetensors"
    if not exported.exists():
        words = ["-m", "mimscale", "convert", folder / "teacher", exported, "--to", "timm"]
        stage(f"seed {seed}: teacher exported", *words)
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    teacher = [f"teachers.mnist.weights={weights}", f"teachers.mnist.sha256={sha256}"]
    train("MaskAlign, no labels", "demo_maskalign", "maskalign", "digits-unlabelled", *teacher)
    random = ["teachers.mnist.weights=null", "teachers.mnist.random=true"]
    train("control: a random teacher", "demo_maskalign", "control", "digits-unlabelled", *random)
    train("MAE, no labels", "demo_mae", "mae", "digits-unlabelled")
    for name, (title, recipe, own) in EXTRAS.items() if extras else ():
        weights_of = teacher if recipe == "demo_mrmae" else ()
        train(f"{title}, no labels", recipe, name, "digits-unlabelled", *own, *weights_of)


def evaluate(folder: Path, seed: int, shards: Mapping[str, Path], stage: Stages, extras: bool) -> Scores:
    """Accuracy in percent on the 500 test digits. One process per protocol for all networks."""
    runs = [folder / name for name in (*RUNS, *(EXTRAS if extras else ()))]
    common = ["--train", shards["digits-train"], "--val", shards["digits-test"], "--crop-pct", 1, "--workers", 0]
    common += ["--seed", seed, "--device", DEVICE, "--baselines"]
    scores: Scores = {name: {} for name in rows(extras)}
    for protocol, flags in (("knn", []), ("linear", []), ("lowshot", ["--shots", 5, "--draws", 3])):
        report = folder / f"{protocol}.json"
        words = ["-m", "mimscale", "evaluate", protocol, *runs, *common, *flags, "--out", report]
        stage(f"seed {seed}: evaluate {protocol}", *words)
        for run in runs:  # where `mimscale report` and `mimscale runs` read it
            (run / "eval").mkdir(exist_ok=True)
            shutil.copyfile(report, run / "eval" / report.name)
        for row in json.loads(report.read_text())["rows"]:
            network = row["network"]
            if network.startswith("random init"):  # its shape is in the name if there are several
                network = CONV_RANDOM if "ConvViT" in network else "random init"
            scores[network] |= {metric: row[metric] for metric in METRICS if metric in row}
    return scores


# ------------------------------------------------------------------------------------------------ results


def mean(scores: Sequence[Scores], network: str, metric: str) -> float:
    return statistics.fmean(of_seed[network][metric] for of_seed in scores)


def cells(scores: Sequence[Scores]) -> list[list[str]]:
    """One line per network: title, training data, and mean (± standard deviation over seeds) of each metric."""
    lines = []
    for network, (title, trained_on) in rows("mrmae" in scores[0]).items():
        line = [title, trained_on]
        for metric in METRICS:
            values = [of_seed[network][metric] for of_seed in scores]
            deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            line.append(f"{statistics.fmean(values):.1f}{deviation}")
        lines.append(line)
    return lines


def findings(scores: Sequence[Scores]) -> list[str]:
    """Sentences with the differences between networks."""
    titles = rows(extras := "mrmae" in scores[0])

    def compare(first: str, second: str) -> str:
        gaps = [(m, mean(scores, first, m) - mean(scores, second, m)) for m in ("knn", "lowshot")]
        text = " and ".join(f"{gap:+.1f} points in {METRICS[m]}" for m, gap in gaps)
        return f"{titles[first][0]} against {titles[second][0]}: {text}."

    pairs = [("maskalign", other) for other in ("random init", "control", "teacher", "raw pixels")]
    for name in ("mae", *(EXTRAS if extras else ())):
        pairs.append((name, CONV_RANDOM if "convmae" in name else "random init"))
    return [compare(*pair) for pair in pairs]


def failures(scores: Sequence[Scores], scale: float) -> list[str]:
    """One line for each margin that is not reached."""
    out = []
    pairs = [("maskalign", "random init", OVER_RANDOM), ("maskalign", "control", OVER_CONTROL)]
    pairs += [("mrmae", "random init", OVER_RANDOM)] if "mrmae" in scores[0] else []
    for name, other, points in pairs:
        for metric in ("knn", "lowshot"):
            margin = mean(scores, name, metric) - mean(scores, other, metric)
            if not margin > points * scale:
                title = rows(True)[name][0]
                out.append(f"{METRICS[metric]}: {title} is {margin:.1f} points over {other}, not {points * scale:g}")
    return out


def verdict(scores: Sequence[Scores], scale: float) -> int:
    """Print the margins that are not reached. Exit code 1 if there are any."""
    missed = failures(scores, scale)
    for line in missed:
        console.print(Text.assemble(("not reached", "red"), f"  {line}"))
    return 1 if missed else 0


def caption(scores: Sequence[Scores], changes: Sequence[str]) -> str:
    """Text below the table: data, metrics, command, versions."""
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{RANKS} processes on a CPU"
    over = f"Mean ± standard deviation over {len(scores)} seeds" if len(scores) > 1 else "One seed"
    flags = ["--all"] * ("mrmae" in scores[0]) + [f"--set {change}" for change in changes]
    command = " ".join(["bash jobs/demo.sh", *flags])
    commit = git_commit() or "unknown"
    changed = " with changes" if commit.endswith("+") else ""
    return (
        "Percent of 500 of scikit-learn's digits that are classified right; no network and no probe saw these. "
        "Features are the mean of the frozen network's patch tokens. kNN and linear learn from the labels of the other "
        f"1,297 digits, 5-shot from 5 labels per class (mean of 3 draws). {over}; `{command}`, {where}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, commit {commit[:12]}{changed}."
    )


def publish(out: Path, scores: Sequence[Scores], caption: str, seconds: float) -> None:
    """Print the table, write it to demo.md, and write all single values to demo.json."""
    headings = ["network", "has seen", *METRICS.values()]
    table = Table(title="top-1 in percent, frozen features")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < 2 else "right")
    lines = cells(scores)
    for line in lines:
        table.add_row(*line, style="bold" if line[0] == "MaskAlign" else None)
    console.print(table)
    markdown = [headings, ["---", "---", *("---:" for _ in METRICS)], *lines]
    sentences = "\n".join(f"- {finding}" for finding in findings(scores))
    text = "\n".join(f"| {' | '.join(line)} |" for line in markdown)
    (out / "demo.md").write_text(f"{text}\n\n{caption}\n\n{sentences}\n")
    console.print(f"{caption}\n{sentences}")
    report = {"caption": caption, "seconds": round(seconds, 1), "scores": list(scores)}
    (out / "demo.json").write_text(json.dumps(report, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------ command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 where a stage fails or, with --check, where a margin is not reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="repeat all of it with seeds 0, 1, ... (default 1)")
    parser.add_argument(
        "--all", action="store_true", help=f"more students: {', '.join(t for t, *_ in EXTRAS.values())}"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo", help="folder (default runs/demo)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NETWORK:KEY=VALUE",
        help=f"change a recipe, such as mae:schedule.epochs=160; networks: {', '.join((*RUNS, *EXTRAS))}",
    )
    check = (
        f"fail unless MaskAlign is SCALE x {OVER_RANDOM:g} points over random and x {OVER_CONTROL:g} over its control, "
        "and with --all MR-MAE over random as well"
    )
    parser.add_argument("--check", type=float, metavar="SCALE", help=check)
    args = parser.parse_args(arguments)
    names = (*RUNS, *(EXTRAS if args.all else ()))
    for change in args.set:
        if "=" not in change or change.partition(":")[0] not in names:
            parser.error(f"--set {change}: not NETWORK:KEY=VALUE with a network of {', '.join(names)}")
    out, start_s = args.out.resolve(), time.monotonic()

    stage = Stages(out / "logs")
    shards = prepare(out, stage)
    scores = []
    for seed in range(args.seeds):
        folder = out / f"seed-{seed}"
        pretrain(folder, seed, shards, stage, args.all, args.set)
        scores.append(evaluate(folder, seed, shards, stage, args.all))
    stage("images", ROOT / "jobs" / "demo_images.py", out / "seed-0", shards["digits-test"], out / "demo.png")
    publish(out, scores, caption(scores, args.set), time.monotonic() - start_s)
    console.print(
        f"{time.monotonic() - start_s:.0f} s in all. {out}: demo.md, demo.json, demo.png, logs/", soft_wrap=True
    )
    console.print(f"curves: tensorboard --logdir {out}", soft_wrap=True)
    return verdict(scores, args.check) if args.check is not None else 0


if __name__ == "__main__":
    sys.exit(main())
