"""Speed of the training step: images/s, MFU, where the time goes, memory; engine, method and teachers as in a run"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimscale.files.command_line import print_json, stdout_kept

if TYPE_CHECKING:
    from mimscale.bench._cases import TrainCase

PASSED = ("micro_batch", "accumulation", "steps", "repeats", "warm_up", "memory_limit")  # to each case's process
FLAGS = ("data", "pretrained", "profile", "save")

EXAMPLE = "mimscale bench train mae_vit_l16 --micro-batch 64 --profile engine.ds_config=zero2_bf16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE[,VARIANT...]",
        help="a recipe; each variant is another row: section.key=value, several of them joined by +",
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="changes to the recipe")
    parser.add_argument("--micro-batch", type=int, help="images per rank and forward pass (default: the recipe's)")
    parser.add_argument("--accumulation", type=int, help="micro-batches per step (default: 1)")
    parser.add_argument("--steps", type=int, help="steps of a repeat (default: 8)")
    parser.add_argument("--repeats", type=int, help="repeats, of which median, minimum and maximum count (default: 3)")
    parser.add_argument("--warm-up", type=int, help="steps before them (default: 4)")
    parser.add_argument("--data", action="store_true", help="read data.shards instead of random pixels on the device")
    parser.add_argument("--pretrained", action="store_true", help="load the teachers' weights instead of random ones")
    parser.add_argument("--save", action="store_true", help="also how long a checkpoint stalls the step")
    parser.add_argument("--against", choices=["torch"], help="the same step on the PyTorch engine, as another row")
    parser.add_argument("--profile", action="store_true", help="torch.profiler: kernels, what takes longest")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="with --profile: a trace for chrome://tracing")
    parser.add_argument("--find-batch", action="store_true", help="find the largest micro-batch that fits, first")
    parser.add_argument("--memory-limit", type=float, metavar="GIB", help="of a process; a CPU has no other limit")
    parser.add_argument("--suite", choices=["gpu", "tiny"], help="a list of cases instead of a recipe")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds for all cases of a suite (gpu: 520)")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="of the suite, these cases only")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures here; of a suite, a line per case")


def run(args: argparse.Namespace) -> int:
    from mimscale.errors import UserError

    if (args.suite is None) == (args.recipe is None):
        raise UserError("bench train measures a recipe or a --suite; give one of them")
    several = args.suite or args.against or args.find_batch or "," in (args.recipe or "")
    if several and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "bench train with variants, --against, --find-batch or --suite starts a process per case, and torchrun has "
            "started several; call it without torchrun, or with one recipe"
        )
    if args.suite is not None:
        return _run_suite(args)
    if args.trace is not None and not args.profile:
        raise UserError("--trace is written by --profile; give both")
    cases = make_cases(args.recipe, args.overrides, args.against)
    with stdout_kept(args.json):
        if args.find_batch:
            args.micro_batch, found = _find_batch(args, cases[0])
            print(f"largest micro-batch that fits: {args.micro_batch}\n")
            rows = [found, *_in_processes(cases[1:], args)]
        else:
            rows = [_measure(args)] if len(cases) == 1 else _in_processes(cases, args)
    return _finish(rows, args)


def make_cases(recipe: str, overrides: Sequence[str], against: str | None) -> list[TrainCase]:
    """The recipe, then its variants, then (or before, where it is the only one) the same on the PyTorch engine."""
    from mimscale.bench._cases import TrainCase

    name, *variants = recipe.split(",")
    cases = [TrainCase(name, name, tuple(overrides))]
    cases += [TrainCase(f"{name} {variant}", name, (*overrides, *variant.split("+"))) for variant in variants]
    if against is not None:
        cases += [
            TrainCase(f"{case.name}, PyTorch engine", name, (*case.overrides, "engine.backend=torch")) for case in cases
        ]
    return cases


# ---------------------------------------------------------------------------------------------------------- one case


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    """In this process; with torchrun on all of its ranks."""
    from mimscale.bench import _train_case
    from mimscale.config.recipes import load_recipe

    if args.memory_limit is not None:
        import resource

        limit = int(args.memory_limit * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    given = {name: getattr(args, name) for name in (*PASSED[:-1], *FLAGS) if getattr(args, name) is not None}
    options = _train_case.Options(**given, trace=args.trace)
    measured = _train_case.measure(load_recipe(args.recipe, args.overrides), options)
    return {"case": args.recipe, "recipe": args.recipe, "overrides": args.overrides, **measured}


def _in_processes(cases: Sequence[TrainCase], args: argparse.Namespace) -> list[dict[str, Any]]:
    from mimscale.bench._cases import run_case

    return [run_case(case, _words(args), limit_s=600.0) for case in cases]


def _words(args: argparse.Namespace) -> list[str]:
    given = [(name, getattr(args, name)) for name in PASSED if getattr(args, name) is not None]
    words = [word for name, value in given for word in (f"--{name.replace('_', '-')}", str(value))]
    return [*words, *(f"--{name}" for name in FLAGS if getattr(args, name))]


def _find_batch(args: argparse.Namespace, case: TrainCase) -> tuple[int, dict[str, Any]]:
    """(the largest micro-batch, its row). A short try that fits may still run out of memory in more steps: then less
    by an eighth.
    """
    from mimscale.bench._cases import out_of_memory, run_case
    from mimscale.bench._find_batch import fits_in_a_process, largest
    from mimscale.errors import UserError

    short = argparse.Namespace(**{**vars(args), "steps": 1, "repeats": 1, "warm_up": 2, "micro_batch": None})
    short.profile = False
    words = [*case.overrides, *_words(short)]
    command = [sys.executable, "-m", "mimscale", "bench", "train", case.recipe, *words]
    size = largest(fits_in_a_process(command), args.micro_batch or 8)
    while size:
        args.micro_batch = size
        row = run_case(case, _words(args), limit_s=600.0)
        if "error" not in row or not out_of_memory(row["error"], 0):
            return size, row
        size = size * 7 // 8
    raise UserError(f"--find-batch: one image of {case.recipe} does not fit; `mimscale plan` says what takes memory")


# ------------------------------------------------------------------------------------------------------------- suite


def _needs_a_gpu() -> None:
    import torch

    from mimscale.errors import UserError

    if not torch.cuda.is_available():
        raise UserError("--suite gpu needs a GPU and torch sees none here; --suite tiny is for a CPU")


def _run_suite(args: argparse.Namespace) -> int:
    from mimscale.bench import _suites
    from mimscale.bench._cases import run_cases
    from mimscale.bench._report import origin
    from mimscale.errors import UserError

    if args.suite == "gpu":
        _needs_a_gpu()
    cases = _suites.SUITES[args.suite]
    unknown = sorted(set(args.only or ()) - {case.name for case in cases})
    if unknown:
        raise UserError(f"--only {unknown[0]} is no case of {args.suite}; it has {', '.join(c.name for c in cases)}")
    cases = tuple(case for case in cases if args.only is None or case.name in args.only)
    where = origin()
    if not args.json:
        print(f"{device_name()}\n\n{heads()}", flush=True)

    def show(row: dict[str, Any]) -> None:
        print(line(row), flush=True, file=sys.stderr if args.json else sys.stdout)
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(json.dumps({**row, "device": device_name(), "origin": where}) + "\n")

    with tempfile.TemporaryDirectory(prefix="mimscale-shards-") as folder:
        budget_s = args.budget or _suites.BUDGETS_S[args.suite]
        shards = Path(folder)
        rows = list(
            run_cases(cases, _words(args), budget_s, show, make_shards=lambda: _suites.write_shards(shards, 2000))
        )
    if args.json:
        print_json({"bench": "train", "device_name": device_name(), "origin": where, "cases": rows})
    else:
        print(_details(rows) + f"\n{NOTE}\n\n{where}")
    return 1 if all("error" in row for row in rows) else 0


# ------------------------------------------------------------------------------------------------------------ report

LEAST_COSINE = 0.995
"""Of a teacher's features in low precision with those in fp32, below which its rate is worth nothing."""
COLUMNS = (
    "case", "images", "images/s (min - max)", "step ms", "MFU %", "of product %", "host ms", "data", "teacher",
    "forward", "backward", "update", "GiB", "loss",
)  # fmt: skip
NOTE = (
    "Median of the repeats. *MFU*: FLOPs of student and teachers (`mimscale.cost.flops`) over the peak of the data "
    "sheet; *of product*: over the rate of a large product measured before. *host ms*: until the host has handed over "
    "a step. *data* to *update*: ms of the device per step. *GiB*: allocated / reserved at most; on a CPU resident."
)


def _finish(rows: list[dict[str, Any]], args: argparse.Namespace) -> int:
    from mimscale.bench._report import origin

    if rows[0].get("rank"):
        return 0
    where, name = origin(), device_name()
    values = {"bench": "train", "device_name": name, "origin": where, "cases": rows, **_for_plan(rows[0])}
    if args.json:
        print_json(values)
    else:
        print("\n".join([name, "", heads(), *map(line, rows), _details(rows), NOTE, "", where]))
    if not args.json and len(rows) > 1 and not any("error" in row for row in rows) and args.against is not None:
        half = len(rows) // 2
        for ours, theirs in zip(rows[:half], rows[half:], strict=True):
            print(
                f"{ours['case']}: {ours['images_per_s'] / theirs['images_per_s']:.2f} x the PyTorch engine's images/s"
            )
    if args.out is not None:
        args.out.write_text(json.dumps(values, indent=1) + "\n")
    return 1 if any("error" in row for row in rows) else 0


def _for_plan(row: dict[str, Any]) -> dict[str, Any]:
    """The section that `mimscale plan --measured` reads, and the row of its table of devices that it is for."""
    import torch

    from mimscale.cost.peak import row_of

    if "error" in row:
        return {}
    if row["peak_tflops"] is None:  # a CPU, or a GPU that the table lacks, which may take any row's place
        peak = {row["precision"]: 1e12 * row["product_tflops"]}
        measured = {"device": {"peak": peak, "matmul": 1.0}}
        return measured if row["on_gpu"] else {**measured, "device_row": "cpu"}
    on = row_of(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory)
    return {"device": {"matmul": row["product_tflops"] / row["peak_tflops"]}, "device_row": on}


def heads() -> str:
    from mimscale.bench._report import table

    return table(list(COLUMNS), [])


def line(row: dict[str, Any]) -> str:
    """A row of the table; a case that failed says why."""
    if "error" in row:
        return f"| {row['case']} | {row['error'].replace('|', '/')} |" + " |" * (len(COLUMNS) - 2)
    share = "" if row["mfu"] is None else f"{100 * row['mfu']:.1f}"
    memory = " / ".join(f"{gib:.1f}" for gib in row["memory"].values())
    cells = [
        row["case"],
        f"{row['micro_batch'] * row['accumulation'] * row['ranks']}",
        f"{row['images_per_s']:,.1f} ({row['images_per_s_min']:,.1f} - {row['images_per_s_max']:,.1f})",
        f"{row['step_ms']:.1f}",
        share,
        f"{100 * row['mfu_measured']:.1f}",
        f"{row['host_ms']:.1f}",
        *(f"{row['device_ms'][phase]:.1f}" for phase in ("data", "teacher", "forward", "backward", "update")),
        memory,
        f"{row['loss']:.4f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _details(rows: Sequence[dict[str, Any]]) -> str:
    """What does not fit into the table: the engine's notes and the profile."""
    lines = [""]
    for row in rows:
        lines += [f"{row['case']}: {note}" for note in row.get("notes", ())]
        if "save_stall_ms" in row:
            stall = f"{row['save_stall_ms']:.1f} ms, its step takes {row['step_ms']:.1f} ms"
            lines.append(f"{row['case']}: a save of {row['save_gib']:.2f} GiB stalls for {stall}")
        for name, value in row.get("teacher_cosine", {}).items():
            verdict = "reached" if value >= LEAST_COSINE else "MISSED"
            lines.append(f"{row['case']}: teachers.{name}: cosine {value:.5f} with fp32; {LEAST_COSINE}: {verdict}")
        found = row.get("profile")
        if found is not None:
            lines.append(
                f"{row['case']}: {found['kernels']} {found['counted']}, "
                f"{found['kernel_ms']:.1f} ms of {row['step_ms']:.1f} ms, "
                f"{found['communication_ms']:.1f} ms in collectives"
            )
            lines += [f"  {ms:9.3f} ms  {count:8.1f} x  {name}" for name, ms, count in found["top"]]
    return "\n".join([*lines, ""])


def device_name() -> str:
    import torch

    from mimscale.bench._report import processor

    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
