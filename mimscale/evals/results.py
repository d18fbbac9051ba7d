"""mimscale results: what the evaluations of a run found, in one file, beside what its recipe expects. Needs no torch.

It reads reports of `mimscale evaluate` in RUN/eval and in eval/ of runs inside RUN (a fine-tuning), metrics.jsonl, and
what the stages of `jobs/submit` left in RUN/job. It trusts none of them: what cannot be read is listed and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mimscale.config.recipes import load_recipe
from mimscale.errors import UserError, printable, warn
from mimscale.evals.config import Expected
from mimscale.files.atomic import atomic_write
from mimscale.files.command_line import add_json, end_with_example, print_json
from mimscale.files.console import plain_console
from mimscale.files.eval_reports import BROKEN, Figure, figures_below, listed, options_that_differ, parsed, scalar
from mimscale.files.metrics_lines import STAMPS
from mimscale.files.regular import read_regular

FORMAT = 1
RUN_FILES = ("config.yaml", "metrics.jsonl", "eval", "job")
STAGE_OF = {"top1": "finetune"}
"""Protocol -> the stage of jobs/submit that runs it, where its name is another."""
ROUNDING = 0.05  # published values have one decimal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--recipe", help="whose expected values to compare with (default: the run's own config.yaml)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: results.json in the run's folder")
    add_json(parser, "print JSON in place of the tables; the file is written all the same")
    end_with_example(parser, "mimscale results runs/l16", "mimscale results runs/l16 --recipe mae_vit_l16 --json")


def run(args: argparse.Namespace) -> int:
    try:
        names = os.listdir(args.run)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{args.run} is no folder; name the folder of a run") from None
    except OSError as error:
        raise UserError(f"{args.run} cannot be read ({error.strerror}); name the folder of a run") from None
    if not {*names} & {*RUN_FILES}:
        raise UserError(f"{args.run} is no run: it holds none of {', '.join(RUN_FILES)}; name the folder of a run")
    gathered = gather(args.run, expected_values(args.run, args.recipe))
    console = plain_console(stderr=args.json)
    if args.json:
        print_json(gathered)
    for table in () if args.json else tables(gathered):
        console.print(table)
    for line in gathered["unreadable"]:
        warn(f"mimscale results: {line}; left out")
    out = args.out or args.run / "results.json"
    try:
        atomic_write(out, (json.dumps(gathered, indent=1, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}; name another file with --out") from None
    console.print(printable(f"wrote {out}"), soft_wrap=True)
    return 0


def expected_values(run_dir: Path, recipe: str | None) -> Mapping[str, Expected]:
    """Of the recipe, or of the run's own; none where the run has not begun. Raises UserError for a bad recipe."""
    if recipe is None and not (run_dir / "config.yaml").is_file():
        return {}
    return load_recipe(recipe or str(run_dir / "config.yaml")).expected


def gather(run_dir: Path, expected: Mapping[str, Expected]) -> dict[str, Any]:
    """The content of results.json."""
    unreadable: list[str] = []
    figures = list(figures_in(run_dir, unreadable))
    stages = stages_of(run_dir, unreadable)
    return {
        "format": FORMAT,
        "run": str(run_dir),
        "stages": stages,
        "training": training(run_dir, unreadable),
        "figures": [figure._asdict() for figure in figures],
        "expected": [compared(name, wanted, figures, stages) for name, wanted in expected.items()],
        "unreadable": unreadable,
    }


def figures_in(run_dir: Path, unreadable: list[str]) -> Iterator[Figure]:
    """Those of all reports. unreadable: gets a line for each file that is no report."""
    folders = [path / "eval" for path in listed(run_dir, run_dir, unreadable) if path.name != "eval"]
    for folder in sorted([run_dir / "eval", *folders]):
        yield from figures_below(folder, run_dir, unreadable)


def _lines(path: Path, run_dir: Path, unreadable: list[str]) -> list[str]:
    """Of a text file, none where there is none."""
    try:
        return read_regular(path).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        unreadable.append(f"{path.relative_to(run_dir)} cannot be read ({error.strerror})")
        return []


def stages_of(run_dir: Path, unreadable: list[str]) -> dict[str, dict[str, str]]:
    """Stage of `jobs/submit` -> the number of its last job, and its state.

    done; failed, exit code N; not run: it never began, because a stage that it needs failed; unfinished: it runs, or
    was killed before it could say what became of it.
    """
    stages: dict[str, dict[str, str]] = {}
    files = {path.name: path for path in listed(run_dir / "job", run_dir, unreadable)}
    for line in _lines(files["jobs.txt"], run_dir, unreadable) if "jobs.txt" in files else ():
        stage, _, job = line.partition(" ")
        if not re.fullmatch(r"[\w.-]+", stage) or stage == "results":
            continue
        found = [files[name] for name in files if re.fullmatch(rf"stage-{re.escape(stage)}(-.*)?\.txt", name)]
        states = sorted({"\n".join(_lines(path, run_dir, unreadable)).strip() for path in found})
        state = next((s for s in states if s.startswith("failed")), None)
        if state is None:
            state = {(): "not run", ("done",): "done"}.get(tuple(states), "unfinished")
        stages[stage] = {"job": job, "state": state}
    return stages


def training(run_dir: Path, unreadable: list[str]) -> dict[str, Any]:
    """The last line of the training's metrics, and the last evaluation while it trained; empty where there is none."""
    last: dict[str, Any] = {}
    for line in _lines(run_dir / "metrics.jsonl", run_dir, unreadable):
        try:
            values = parsed(line)
        except BROKEN:
            continue  # cut off by a crash
        if not isinstance(values, dict):
            continue
        plain = {key: value for key, value in values.items() if scalar(value)}
        if "step" in plain and "loss" in plain:
            last |= {"step": plain["step"], "loss": plain["loss"]}
        elif plain.get("event") == "evals":
            last["evals"] = {key: value for key, value in plain.items() if key not in ("event", "seconds", *STAMPS)}
    return last | {"finished": (run_dir / "done").is_file()}


def compared(
    name: str, wanted: Expected, figures: Sequence[Figure], stages: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """An expected value beside what was found: reached, short by so much, failed, or not run.

    Of several figures with the published options that of the newest checkpoint counts. Reached: at the published one
    decimal.
    """
    metric = wanted.metric or name
    fit = [f for f in figures if f.protocol == name and f.metric == metric and wanted.pool in (None, f.pool)]
    entry = {"protocol": name, "metric": metric, "expected": wanted.value, "source": wanted.source}
    if not fit:
        state = stages.get(STAGE_OF.get(name, name), {}).get("state", "")
        return {**entry, "found": None, "status": "failed" if state.startswith("failed") else "not run"}
    published = [figure for figure in fit if not figure.changed]
    if not published:
        other = "; ".join(dict.fromkeys(word for figure in fit for word in figure.changed))
        return {**entry, "found": None, "status": f"only with other options ({other})"}
    best = max(published, key=lambda figure: -1 if figure.step is None else figure.step)
    short = wanted.value - best.value
    status = "reached" if short < ROUNDING else f"short by {short:.1f}"
    return {**entry, "found": best.value, "pool": best.pool, "report": best.report, "options": best.options} | {
        "status": status
    }


def tables(gathered: Mapping[str, Any]) -> Iterator[Table]:
    """For the terminal: stages, figures, and the comparison, as far as there are any."""
    if gathered["stages"]:
        table = Table("stage", "job", "state", title="stages")
        for stage, of in gathered["stages"].items():
            table.add_row(stage, of["job"], Text(printable(of["state"])))
        yield table
    table = Table("protocol", "pool", "metric", "step", "value", "options", title=printable(gathered["run"]))
    for f, options in zip(gathered["figures"], options_that_differ(gathered["figures"]), strict=True):
        step = "" if f["step"] is None else f"{f['step']:,}"
        table.add_row(
            *(Text(printable(word)) for word in (f["protocol"], f["pool"], f["metric"], step)),
            f"{f['value']:.1f}",
            Text(printable(options)),
        )
    yield table
    if gathered["expected"]:
        table = Table("protocol", "expected", "found", "status", "source", title="the recipe's expected values")
        for e in gathered["expected"]:
            found = "" if e["found"] is None else f"{e['found']:.1f}"
            table.add_row(e["protocol"], f"{e['expected']:.1f}", found, Text(printable(e["status"])), Text(e["source"]))
        yield table
