"""What `mimscale plan` prints: rows for tables, plain values for JSON, and the job to submit."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mimscale.config.deepspeed import load_ds_config, precision_of
from mimscale.config.recipes import recipe_names, with_overrides
from mimscale.config.run import RunConfig
from mimscale.cost.devices import GIB, Device
from mimscale.cost.flops import arithmetic_of
from mimscale.cost.planner import Choice, Planner, Prediction, as_json, changes
from mimscale.cost.run_cost import RunCost, run_cost
from mimscale.files.durations import duration

SMALL_MICRO_BATCH = 32
"""Images per forward pass below which the host, and not the GPU, decides a step's time."""
SPARE = 1.25
"""Wall time that a job asks for, over the predicted one; longer runs are continued by requeueing."""
LONGEST_JOB_H = 24.0


def for_gpu(config: RunConfig, gpu: Device) -> tuple[RunConfig, list[str]]:
    """A recipe in a precision that the GPU has, and the overrides that make it so: fp16 where there is no bf16."""
    precision = precision_of(load_ds_config(config.engine.ds_config))
    words = []
    if precision not in gpu.peak and config.engine.ds_config.endswith(precision):
        words.append(f"engine.ds_config={config.engine.ds_config.removesuffix(precision)}fp16")
    if arithmetic_of(config, precision) not in (precision, *gpu.peak):
        words.append(f"method.encoder_precision={precision}")
    for name, teacher in config.teachers.items():
        if teacher.precision not in ("fp32", "fp16") and teacher.precision not in gpu.peak:
            words.append(f"teachers.{name}.precision=fp16")
    return (with_overrides(config, words) if words else config), words


@dataclass(frozen=True)
class Plan:
    """asked: the recipe's own choice; best: the fastest that fits, or None; change: the smallest change of `asked` that
    makes it fit, None where it fits or no single one does. cost: of a run with `chosen`. precision: overrides without
    which the GPU could not run the recipe. given: the user's overrides.
    """

    planner: Planner
    asked: Prediction
    best: Prediction | None
    change: Prediction | None
    cost: RunCost
    precision: tuple[str, ...] = ()
    given: tuple[str, ...] = ()

    @property
    def chosen(self) -> Prediction:
        return self.best or self.asked


def make_plan(
    planner: Planner, samples: int, assumed: bool, precision: Sequence[str] = (), given: Sequence[str] = ()
) -> Plan:
    """Raises UserError where the recipe cannot run on this cluster at all."""
    asked = planner.predict(planner.asked())
    best = planner.best()
    change = None if asked.fits else planner.smallest_change(asked)
    cost = run_cost(planner, best or asked, samples, assumed)
    return Plan(planner, asked, best, change, cost, tuple(precision), tuple(given))


# ---------------------------------------------------------------------------------------------------- the job to submit


def sbatch_options(plan: Plan, name: str) -> list[str]:
    """Options for sbatch, the script, and the overrides of the choice: words of a command line."""
    planner, cost = plan.planner, plan.cost
    hours = min(LONGEST_JOB_H, max(0.5, cost.run_s / 3600 * SPARE))
    minutes = math.ceil(hours * 60)
    script = "pretrain_vit_h" if planner.config.student.depth >= 32 else "pretrain_vit_l"
    return [
        "sbatch",
        f"--job-name={name}",
        f"--nodes={planner.nodes}",
        f"--gpus-per-node={planner.per_node}",
        f"--ntasks-per-node={planner.per_node}",
        f"--cpus-per-task={cpus(cost)}",
        f"--time={minutes // 60}:{minutes % 60:02d}:00",
        f"jobs/{script}.sbatch",
        *overrides(plan),
    ]


def cpus(cost: RunCost) -> int:
    """CPU cores per rank: those that decode, and one for the trainer."""
    return max(3, math.ceil(cost.cores) + 1)


def overrides(plan: Plan) -> list[str]:
    """What to give to `mimscale train`, or after the script's name; the user's own first, for the last one counts."""
    more = [f"data.workers={cpus(plan.cost) - 1}"]
    if plan.cost.checkpoint_every:
        more.append(f"checkpoint.every={plan.cost.checkpoint_every}")
    teachers = [word for word in plan.precision if word.startswith("teachers.")]
    return [*plan.given, *plan.chosen.choice.overrides(), *teachers, *more]


def command(plan: Plan, name: str) -> str:
    return f"RECIPE={shlex.quote(name)} " + shlex.join(sbatch_options(plan, name))


# -------------------------------------------------------------------------------------------------------------- rows


def gib(size: float) -> str:
    if size < GIB / 10:
        return f"{size / 2**20:.3g} MiB"
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:.1f} GiB"


def operations(count: float) -> str:
    """FLOPs with the unit that leaves a number of at least 1."""
    unit, size = next((u for u in (("GFLOP", 1e9), ("MFLOP", 1e6)) if count >= u[1]), ("kFLOP", 1e3))
    return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"


def flops_rows(planner: Planner) -> list[tuple[str, str]]:
    flops = planner.flops
    rows = [(part, f"{operations(value)}, {value / flops.training:.0%}") for part, value in flops.by_part().items()]
    return [*rows, ("all", f"{operations(flops.training)} per image of training")]


def memory_rows(planner: Planner, choice: Choice) -> list[list[str]]:
    """A table: memory by part at ZeRO 0 to 3 with the micro-batch and recomputation of a choice."""
    stages = [planner.memory(choice, stage) for stage in range(4)]
    parts = list(dict.fromkeys(part for one in stages for part in one.parts))
    rows = [["at ZeRO stage", *map(str, range(4))]]
    rows += [[part, *(gib(one.parts[part]) if part in one.parts else "" for one in stages)] for part in parts]
    rows.append(["all", *(gib(one.total) for one in stages)])
    rows.append(["most in the", *(one.moment for one in stages)])
    return rows


def prediction_rows(planner: Planner, found: Prediction) -> list[tuple[str, str]]:
    """How a choice runs: batch, memory, time and communication of a step."""
    choice, taken = found.choice, found.time
    batch = planner.config.schedule.global_batch
    rows = [
        ("engine", f"{choice.ds_config}: ZeRO stage {found.zero.stage}, {found.zero.precision}"),
        (
            "micro-batch x accumulation x ranks",
            f"{choice.micro_batch} x {choice.accumulation} x {planner.ranks} = {batch}",
        ),
        ("activation checkpointing", str(choice.recompute_every or "off")),
        (
            "memory",
            f"{gib(found.memory.total)} of {gib(found.room)} per GPU: {'fits' if found.fits else 'does not fit'}",
        ),
        ("step", f"{1e3 * taken.total:.0f} ms, {batch / taken.total:,.0f} images/s; the {taken.limit} decides"),
        (
            "GPU",
            f"{1e3 * taken.gpu:.1f} ms: products {1e3 * taken.products:.1f}, "
            f"elementwise {1e3 * taken.elementwise:.1f}, update {1e3 * taken.update:.1f}; "
            f"of these teachers {1e3 * taken.teachers:.1f}",
        ),
        (
            "host's floor",
            f"{1e3 * taken.host:.0f} ms, whatever the batch; {1e3 * planner.gpu.host.step_s:.0f} ms of it between two "
            f"steps, while the GPU is idle",
        ),
    ]
    if planner.ranks > 1:
        messages = sum(one.messages for one in found.collectives)
        sent = sum(one.wire(planner.ranks) for one in found.collectives)
        hidden = 1 - taken.exposed / taken.communication if taken.communication else 1.0
        rows.append(
            (
                "communication per step",
                f"{sent / 1e9:.2f} GB sent by each rank in {messages} messages, "
                f"{found.crossing / 1e9:.2f} GB by each node "
                f"to others; {1e3 * taken.communication:.1f} ms, {hidden:.0%} hidden",
            )
        )
    return rows


def cost_rows(plan: Plan) -> list[tuple[str, str]]:
    cost, planner = plan.cost, plan.planner
    samples = f"{cost.samples:,} images{' (ImageNet-1K assumed; --samples sets it)' if cost.assumed else ''}"
    work = "decode" if planner.config.data.rand_augment is None else "decode and augment"
    saves = f"every {cost.checkpoint_every} steps" if cost.checkpoint_every else "at the end"
    return [
        ("images/s", f"{cost.images_per_s:,.0f}, {cost.images_per_s / planner.ranks:,.0f} per GPU, {cost.mfu:.1%} MFU"),
        ("epoch", f"{duration(cost.epoch_s)} for {samples}"),
        ("run", f"{cost.steps:,} steps, {duration(cost.run_s)}, {cost.gpu_hours:,.0f} GPU-hours"),
        ("data", f"{cost.bytes_per_s / 1e6:,.0f} MB/s of JPEGs; {cost.cores:.1f} CPU cores per GPU {work} them"),
        ("checkpoint", f"{cost.checkpoint_bytes / 1e9:.2f} GB on {planner.ranks} files, {saves}"),
    ]


def larger(name: str) -> str:
    """The recipes of this package that are `name` with a larger batch, as the end of a sentence."""
    found = [other for other in recipe_names() if other.startswith(f"{name}_batch")]
    return f": {', '.join(found)}" if found else ""


def notes(plan: Plan, name: str) -> list[str]:
    """What is wrong with the recipe's own choice, and what this number of ranks costs."""
    asked, best, planner = plan.asked, plan.best, plan.planner
    found = []
    if plan.precision:
        found.append(f"{planner.gpu.name} lacks a precision of the recipe; this is with {' '.join(plan.precision)}")
    if not asked.fits:
        line = f"the recipe's own choice needs {gib(asked.memory.total)} per GPU and {gib(asked.room)} are free; "
        if plan.change is not None:
            words = " ".join(changes(asked.choice, plan.change.choice))
            slower = plan.change.time.total / asked.time.total - 1
            line += f"the smallest change that makes it fit: {words} (step {slower:+.0%})"
        else:
            line += "no single change makes it fit"
            line += "; nothing tried fits: use more GPUs, or a GPU with more memory" if best is None else ""
        found.append(line)
    per_rank = planner.config.schedule.global_batch // planner.ranks
    taken = plan.chosen.time
    if planner.ranks > 1 and per_rank <= SMALL_MICRO_BATCH and taken.total > 2 * taken.gpu:
        batch = planner.config.schedule.global_batch
        found.append(
            f"{planner.ranks} ranks leave {per_rank} images per GPU of the global batch {batch}: "
            f"{1e3 * taken.gpu:.0f} ms of work for the GPU in a step of {1e3 * taken.total:.0f} ms; "
            f"use fewer GPUs, or a recipe with a larger batch{larger(name)}"
        )
    if planner.gpu.source.startswith("measured"):
        found.append(f"rows of the tables of inputs were replaced: {planner.gpu.source.partition(',')[0]}")
    return found


def plan_json(plan: Plan, name: str) -> dict[str, Any]:
    """Everything, in plain values: seconds, bytes, FLOPs."""
    planner = plan.planner

    def one(found: Prediction | None) -> Any:
        if found is None:
            return None
        limits = {"limit": found.time.limit, "memory_total": found.memory.total, "fits": found.fits}
        return {**as_json(found), **limits}

    return {
        "recipe": name,
        "gpu": as_json(planner.gpu),
        "interconnect": as_json(planner.link),
        "gpus": planner.ranks,
        "gpus_per_node": planner.per_node,
        "flops_per_image": {**planner.flops.by_part(), "training": planner.flops.training},
        "asked": one(plan.asked),
        "best": one(plan.best),
        "smallest_change": one(plan.change),
        "run": as_json(plan.cost),
        "reason": planner.why(plan.best) if plan.best else None,
        "overrides": overrides(plan),
        "sbatch": sbatch_options(plan, name),
        "notes": notes(plan, name),
    }


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, rule, *rows])
