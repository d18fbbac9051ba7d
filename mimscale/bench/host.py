"""Host cost of a training step: operators, milliseconds and reads of each engine, at a width that costs nothing"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mimscale.files.command_line import print_json

STAGES = (
    "cpu_zero0_fp32",
    "cpu_zero1_fp32",
    "cpu_zero2_fp32",
    "cpu_zero3_fp32",
    "cpu_zero2_bf16",
    "cpu_zero3_bf16",
)
BATCH = 2

EXAMPLE = "mimscale bench host mae_vit_b16 --eager --rounds 3"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="the recipe whose structure is measured, 32 channels wide, on a CPU")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="changes to the recipe")
    parser.add_argument(
        "--ds-config",
        nargs="+",
        default=STAGES,
        metavar="NAME",
        help=f"files of ds_configs/ (default: {' '.join(STAGES)})",
    )
    parser.add_argument("--eager", action="store_true", help="leave out what is compiled")
    parser.add_argument(
        "--rounds", type=int, default=5, help="the cases are measured in turns, this often (default: 5)"
    )
    parser.add_argument("--steps", type=int, default=5, help="steps of a case in each round (default: 5)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures here, for `mimscale plan`")


def run(args: argparse.Namespace) -> int:
    import torch

    from mimscale.bench import _report
    from mimscale.config.recipes import load_recipe

    torch.set_num_threads(1)
    values = report(load_recipe(args.recipe, args.overrides), args.ds_config, not args.eager, args.rounds, args.steps)
    values = {"bench": "host", "recipe": args.recipe, "overrides": args.overrides, **values, "origin": _report.origin()}
    if args.json:
        print_json(values)
    else:
        print(f"{args.recipe}\n\n{markdown(values['rows'])}\n\n{NOTE}")
        for row in values["rows"]:
            for place, count in row["reads"].items():
                print(f"{row['case']}: reads {count} at {place}")
        print(f"\n{values['origin']}")
    if args.out is not None:
        args.out.write_text(json.dumps(values, indent=1) + "\n")
    return 0


NOTE = (
    "Medians of a step on one thread; the clock is longer where the machine is busy. *By hand*: a loop without an "
    "engine, eager; the two columns of CPU time are medians of the ratios inside each round. In bf16 a CPU's library "
    "for products takes longer per call than in fp32, whatever the engine: the ratio to the same precision is without "
    "that. *Operators*: dispatched in forward pass + backward pass + update. *Reads*: values that the host reads from "
    "the device. Depths, heads and options are the recipe's; width 32, 32 px, 2 images; teachers' targets are computed "
    "beforehand."
)


def report(config: Any, ds_configs: Sequence[str], compiled: bool, rounds: int, steps: int) -> dict[str, Any]:
    """rows: one per case, the first is PyTorch by hand in fp32. host: fields of `mimscale.cost.devices.HostCost`."""
    from mimscale.bench import _host_cases, _narrow
    from mimscale.bench._host_cases import BY_HAND
    from mimscale.distributed.world import from_environment
    from mimscale.engine.deepspeed_runtime import open_process_group

    cases = make_cases(ds_configs, compiled)
    narrow = _narrow.narrow(config, BATCH)
    open_process_group(from_environment("cpu"))
    measured = _host_cases.measure(narrow, cases, rounds=rounds, steps=steps)
    by_hand = {one.case.precision: one for one in measured if one.case.engine == BY_HAND and not one.case.compiled}
    rows = [row(one, measured[0], by_hand.get(one.case.precision), steps) for one in measured]
    return {"rows": rows, "host": host_cost(rows)}


def host_cost(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Fields of `mimscale.cost.devices.HostCost`, in seconds, for this machine: what DeepSpeed adds to PyTorch by hand,
    shared out over the parameters, from the eager rows that are there.
    """
    by_hand, by_stage = rows[0], {one["engine"]: one for one in rows if not one["compiled"]}
    passes_ms = by_hand["ms"]["forward"] + by_hand["ms"]["backward"]
    found = {"kernel_s": passes_ms / _sum(by_hand, "forward", "backward") / 1000}

    def added(one: dict[str, Any], phase: str, count: int) -> float:
        return max(1e-9, (one["ms"][phase] - by_hand["ms"][phase]) / count / 1000)

    stage2 = next((one for name, one in by_stage.items() if "zero2" in name and one["precision"] == "bf16"), None)
    stage3 = next((one for name, one in by_stage.items() if "zero3" in name), None)
    if stage2 is not None:
        found["parameter_s"] = added(stage2, "backward", stage2["parameters"])
        found["update_parameter_s"] = added(stage2, "update", stage2["parameters"])
    if stage3 is not None:
        found["zero3_parameter_s"] = sum(
            added(stage3, phase, stage3["parameters"]) for phase in ("forward", "backward")
        )
    return found


def _sum(one: dict[str, Any], *phases: str) -> int:
    return sum(one["operators"][phase] for phase in phases)


def make_cases(ds_configs: Sequence[str], compiled: bool) -> list[Any]:
    """PyTorch by hand in fp32 and bf16, the engine in PyTorch, DeepSpeed with each file; eager, then compiled."""
    from mimscale.bench._host_cases import BY_HAND, TORCH, Case, precision_of_file

    named = [*[(engine, precision) for engine in (BY_HAND, TORCH) for precision in ("fp32", "bf16")]]
    named += [(name, precision_of_file(name)) for name in ds_configs]
    eager = [Case(engine, precision, False) for engine, precision in named]
    return eager + [case._replace(compiled=True) for case in eager if compiled and _compiles(case.engine)]


def _compiles(engine: str) -> bool:
    """Whether an engine has a compiled twin. Under ZeRO-3 hooks run between the operators of a block."""
    from mimscale.bench._host_cases import BY_HAND, TORCH
    from mimscale.config.deepspeed import load_ds_config

    if engine == BY_HAND:
        return True
    stage = 0 if engine == TORCH else load_ds_config(engine).get("zero_optimization", {}).get("stage", 0)
    return bool(stage < 3)


def row(measured: Any, reference: Any, same_precision: Any, steps: int) -> dict[str, Any]:
    """What JSON and the table say of a case. reference, same_precision: PyTorch by hand in fp32, in the case's own
    precision (None where that cannot be on a CPU).
    """
    from mimscale.bench._host_cases import PHASES, ratio

    operators = measured.operators
    all_of_them = None if operators is None else sum(operators.values())
    same = None if same_precision is None else ratio(measured.totals, same_precision.totals, steps)
    return {
        "case": measured.case.name,
        "engine": measured.case.engine,
        "precision": measured.case.precision,
        "compiled": measured.case.compiled,
        "parameters": measured.parameters,
        "operators": operators,
        "operators_ratio": None if all_of_them is None else all_of_them / sum(reference.operators.values()),
        "ms": {phase: measured.median(phase) for phase in PHASES} | {"step": statistics.median(measured.totals)},
        "ms_ratio": ratio(measured.totals, reference.totals, steps),
        "ms_ratio_same_precision": same,
        "wall_ms": statistics.median(measured.wall_ms),
        "wall_ratio": ratio(measured.wall_ms, reference.wall_ms, steps),
        "reads": measured.reads,
        "loss": measured.loss,
        "notes": measured.notes,
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    from mimscale.bench._host_cases import PHASES
    from mimscale.bench._report import table

    parts = [f"{phase}, CPU ms" for phase in (*PHASES, "step")]
    heads = ["engine", *parts, "/ by hand in fp32", "/ by hand in the same precision", "clock, ms", "/ by hand in fp32"]
    heads += ["operators", "/ by hand in fp32", "reads"]
    lines = []
    for one in rows:
        operators, ms = one["operators"], one["ms"]
        counted = ["", ""]
        if operators is not None:
            counted = [" + ".join(f"{operators.get(phase, 0):,}" for phase in PHASES), f"{one['operators_ratio']:.2f}"]
        times = [f"{ms[phase]:.1f}" for phase in (*PHASES, "step")]
        same = one["ms_ratio_same_precision"]
        times += [f"{one['ms_ratio']:.2f}", "" if same is None else f"{same:.2f}"]
        clock = [f"{one['wall_ms']:.1f}", f"{one['wall_ratio']:.2f}"]
        lines.append([one["case"], *times, *clock, *counted, str(sum(one["reads"].values()))])
    return table(heads, lines)
