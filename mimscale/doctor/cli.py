"""`mimscale doctor [RECIPE] [key=value ...] [--fetch]`: check this machine, a recipe, its data and its teachers.

Starts no process and loads no weights. Every problem is one line with its fix; the exit code is 2 if there is a problem
that would stop the run. With --teacher it measures one teacher instead (teacher.py).
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, TypeVar

import torch
from rich.table import Table
from rich.text import Text

from mimscale.config.deepspeed import load_ds_config, precision_of
from mimscale.config.recipes import load_recipe
from mimscale.config.run import RunConfig, method_class
from mimscale.cost.devices import DEVICES, interconnect
from mimscale.cost.flops import arithmetic_of
from mimscale.cost.planner import Planner
from mimscale.cost.report import flops_rows, gib
from mimscale.data.config import default_decoder
from mimscale.data.decode import explain
from mimscale.data.wds_stream import open_source
from mimscale.distributed.world import check_precision
from mimscale.doctor import compositions, teacher
from mimscale.errors import UserError, printable
from mimscale.files.command_line import add_json, end_with_example, print_json, stdout_kept, tables_json
from mimscale.files.console import plain_console
from mimscale.files.progress import working
from mimscale.teachers import weights
from mimscale.teachers.config import TeacherConfig
from mimscale.teachers.ensemble import adapter, build_skeleton, describe
from mimscale.training import init_weights
from mimscale.training.checked_run import check_classes
from mimscale.types import TeacherInfo

PACKAGES = ("torch", "torchvision", "deepspeed", "timm", "open_clip_torch", "webdataset", "huggingface_hub")
PRECISIONS: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("fp32", "bf16", "fp16")
WORLDS = (1, 2, 4, 8, 16, 32, 64, 128)
T = TypeVar("T")


@dataclass
class Report:
    """rows: (name, value) for the first table. sections: (title, rows) of all. overrides: to give to `mimscale train`.
    problems: that would stop a run.
    """

    rows: list[tuple[str, str]] = field(default_factory=list)
    sections: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def attempt(self, check: Callable[[], T]) -> T | None:
        """The result of a check. A UserError is added to the problems, so that one call of the doctor shows them
        all.
        """
        try:
            return check()
        except UserError as error:
            self.problems.append(str(error))
            return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="name or path to YAML; without it, check the machine only"
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="changes to the recipe")
    add_json(parser)
    parser.add_argument("--compositions", action="store_true", help="which method goes with which masking and fusion")
    fetching = parser.add_argument_group("teachers of the recipe")
    fetching.add_argument("--fetch", action="store_true", help="download weights that are not on this machine")
    where = "where to (default: teachers)"
    fetching.add_argument("--fetch-dir", type=Path, default=Path("teachers"), metavar="DIR", help=where)
    teacher.add_arguments(parser.add_argument_group("one teacher, measured"))
    end_with_example(
        parser, "mimscale doctor", "mimscale doctor maskalign_vit_l16 --fetch data.shards=shards/imagenet-train"
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0: no problem, 2: a problem would stop the run. Raises UserError if the recipe cannot be read."""
    if args.compositions:
        if args.json:
            columns, rows, reasons = compositions.cells()
            print_json({"tables": tables_json([("", columns, rows)]), "notes": reasons})
        else:
            print(compositions.table())
        return 0
    if args.teacher is not None:
        return teacher.run(args)
    if args.recipe is None:
        if args.fetch:
            raise UserError("--fetch without a recipe: name the recipe whose teachers are to be downloaded")
        publish(Report(sections=[("machine", machine().rows)]), args.json)
        return 0
    with stdout_kept(args.json), working("checking", moving=not args.fetch):  # a download draws its own bar
        report = examine(args)
    publish(report, args.json)
    return 2 if report.problems else 0


def examine(args: argparse.Namespace) -> Report:
    """Everything that is known of a recipe on this machine. Raises UserError if it cannot be read."""
    config = load_recipe(args.recipe, args.overrides)
    report = Report()
    check_recipe(config, report)
    size = config.data.image_size
    skeletons = {}
    for name, teacher_config in config.teachers.items():
        skeleton = report.attempt(partial(build_skeleton, name, teacher_config, size))
        if skeleton is not None:
            skeletons[name] = skeleton
    infos = describe(skeletons)
    if len(infos) == len(config.teachers):
        report.attempt(lambda: method_class(config.method.name).check(config, infos))
    works = not report.problems  # what follows is about files
    for name, info in infos.items():
        check_teacher(name, config.teachers[name], info, args.fetch_dir if args.fetch else None, report)
    check_data(config, report)
    report.sections.append((args.recipe, report.rows))
    if works:
        planner = make_planner(config)
        report.sections.append(("FLOPs per image", flops_rows(planner)))
        title = f"global batch {config.schedule.global_batch}: micro-batch x accumulation and predicted memory by ranks"
        report.sections.append((title, batch_rows(config, planner)))
    return report


def publish(report: Report, as_json: bool) -> None:
    """The tables and lines to paste on stdout, or all as JSON; problems also on stderr."""
    if as_json:
        tables = [(title, ["what", "value"], [list(row) for row in rows]) for title, rows in report.sections]
        values = {"tables": tables_json(tables), "overrides": report.overrides, "problems": report.problems}
        print_json(values)
    else:
        for title, rows in report.sections:
            show(title, rows)
    if report.overrides and not as_json:
        print("give these to `mimscale train`, or write them into the recipe:")
        print(*report.overrides, sep="\n")
    for problem in report.problems:
        print(f"problem: {problem}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------ the machine


def machine() -> Report:
    """Versions, devices and their precisions, scheduler, free disk space."""
    report = Report([("python", sys.version.split()[0])])
    report.rows += [(package, _version(package)) for package in PACKAGES]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            device = torch.device("cuda", index)
            report.rows.append(
                (str(device), f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {_precisions(device)}")
            )
    else:
        report.rows.append(("CUDA devices", "none"))
    report.rows.append(("CPU", f"{os.cpu_count()} cores, {_precisions(torch.device('cpu'))}"))
    report.rows.append(("image decoder", explain(default_decoder())))
    job = os.environ.get("SLURM_JOB_ID")
    slurm = f"inside job {job}" if job else "available (sbatch found)" if shutil.which("sbatch") else "not found"
    report.rows.append(("SLURM", slurm))
    report.rows.append(("free disk in this folder", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB"))
    return report


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _precisions(device: torch.device) -> str:
    """The precisions that this device can train in."""
    supported = []
    for precision in PRECISIONS:
        try:
            check_precision(device, precision)
            supported.append(precision)
        except UserError:
            pass
    return " ".join(supported)


# ------------------------------------------------------------------------------------------------ a recipe


def check_recipe(config: RunConfig, report: Report) -> None:
    """Method, student, starting weights and engine."""
    student, rows, columns = config.student, *config.grid
    shape = f"{student.width} wide, {student.depth} blocks, {student.heads} heads"
    report.rows.append(("method", config.method.name))
    report.rows.append(("student", f"{shape}, patch {student.patch}, {rows}x{columns} at {config.data.image_size} px"))
    if config.init is not None:
        known = report.attempt(lambda: init_weights.with_sha256(config, None, resumes=False))
        if known is not None and known.init is not None:
            report.rows.append(("starts from", f"{known.init.weights}, sha256 {known.init.sha256}"))
    ds_config = report.attempt(lambda: load_ds_config(config.engine.ds_config))
    if ds_config is None:
        return
    precision = precision_of(ds_config)
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    report.rows.append(("engine", f"{config.engine.ds_config}: ZeRO stage {stage}, {precision}"))
    arithmetic = arithmetic_of(config, precision)
    if arithmetic != precision:
        report.rows.append(("", f"its frozen encoder computes in {arithmetic}"))
    if torch.cuda.is_available() and config.engine.device != "cpu":
        report.attempt(lambda: check_precision(torch.device("cuda", 0), precision))
    elif config.engine.device == "cpu":
        report.attempt(lambda: check_precision(torch.device("cpu"), precision))
    else:
        report.rows.append(("", "no GPU on this machine: the precision is checked when the run starts"))


def check_teacher(name: str, config: TeacherConfig, info: TeacherInfo, fetch: Path | None, report: Report) -> None:
    """The teacher's shape and weights. fetch: a folder to download missing weights into."""
    cls = "with" if info.has_cls else "without"
    by_norm = ", masks follow the norm of its features" if info.norm_attention else ""
    grid = f"{info.grid[0]}x{info.grid[1]} at {info.image_size} px"
    report.rows.append((f"teacher {name}", f"{config.library} {config.model}, {config.precision}"))
    report.rows.append(("", f"{info.dim} wide, {info.depth} blocks, {grid}, {cls} class token{by_norm}"))
    if config.random:
        report.rows.append(("", "random weights (a control experiment)"))
        return
    path = report.attempt(lambda: _weights(name, config, fetch))
    if path is None:
        return
    digest = report.attempt(lambda: weights.verify(name, config, path))
    if digest is not None:
        report.rows += [("", str(path)), ("", f"sha256 {digest}")]
        if fetch is not None:
            report.overrides.append(f"{shlex.quote(f'teachers.{name}.weights={path}')} teachers.{name}.sha256={digest}")


def _weights(name: str, config: TeacherConfig, fetch: Path | None) -> Path:
    hub = partial(adapter(config.library).hub_file, name, config)
    here = config.weights is not None and (config.weights.is_file() or not weights.names_a_tag(config))
    if fetch is None or here:
        return weights.locate(name, config, hub, may_download=False).absolute()
    file = hub()
    return weights.cached(file) or weights.download(name, file, fetch.absolute() / file.repo.replace("/", "--"))


def check_data(config: RunConfig, report: Report) -> None:
    """Decoder, samples and steps per epoch."""
    manifest = report.attempt(lambda: open_source(config.data))
    if manifest is None:
        return
    report.attempt(lambda: check_classes(config, manifest))
    steps = manifest.samples // config.schedule.global_batch
    shards = len(manifest.shard_paths)
    report.rows.append(("image decoder", explain(config.data.decoder)))
    report.rows.append(("data", f"{manifest.samples} samples in {shards} shards, {steps} steps per epoch"))
    if steps == 0 and config.schedule.steps is None:
        report.problems.append(
            f"schedule.global_batch = {config.schedule.global_batch} exceeds the {manifest.samples} samples of "
            f"{config.data.shards}; lower it, or give schedule.steps instead of schedule.epochs"
        )


def make_planner(config: RunConfig) -> Planner:
    """Predictions for the recipe on the GPU of this machine, else on an A100 of 80 GB, or on a CPU where it asks for
    one.
    """
    gpu = DEVICES["cpu" if config.engine.device == "cpu" else "a100"]
    if torch.cuda.is_available() and config.engine.device != "cpu":
        gpu = replace(gpu, memory=float(torch.cuda.get_device_properties(0).total_memory))
    return Planner(config, gpu, interconnect(None, gpu), 1, 8)


def batch_rows(config: RunConfig, planner: Planner) -> list[tuple[str, str]]:
    """(ranks, micro-batch x accumulation, and the memory that it is predicted to take) for some numbers of ranks."""
    rows = []
    for world in WORLDS:
        try:
            here = planner.on(world)
            choice = here.asked()
            size = here.memory(choice).total
            fits = "" if size <= here.room else f", more than the {gib(here.room)} of one {here.gpu.name}"
            rows.append((str(world), f"{choice.micro_batch} x {choice.accumulation}, {gib(size)} per GPU{fits}"))
        except UserError:
            rows.append((str(world), f"does not divide {config.schedule.global_batch}"))
    return rows


def show(title: str, rows: list[tuple[str, str]]) -> None:
    """Print a title and a table of two columns; long paths are wrapped, not truncated."""
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for what, value in rows:
        table.add_row(printable(what), Text(printable(value)))
    plain_console(width=None if sys.stdout.isatty() else 160).print(Text(printable(title)), table)
