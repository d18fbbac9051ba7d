"""`mimscale doctor [RECIPE] [key=value ...] [--fetch]`: is this machine, this recipe, its data and its teachers ready?

Starts nothing and loads no weights. Every problem is one line with its fix; the exit code is 2 if one of them would
stop the run. With --teacher it measures one teacher instead (teacher.py).
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mimscale.config.deepspeed import load_ds_config, precision_of
from mimscale.config.recipes import load_recipe
from mimscale.config.run import RunConfig, method_class
from mimscale.data import device_decode
from mimscale.data.config import default_decoder
from mimscale.data.decode import explain
from mimscale.data.wds_stream import open_source
from mimscale.distributed.world import check_precision
from mimscale.doctor import compositions, teacher
from mimscale.errors import UserError
from mimscale.teachers import weights
from mimscale.teachers.config import TeacherConfig
from mimscale.teachers.ensemble import adapter, describe
from mimscale.training import init_weights
from mimscale.training.micro_batch import solve_micro_batch
from mimscale.types import TeacherInfo

PACKAGES = ("torch", "torchvision", "deepspeed", "timm", "open_clip_torch", "webdataset", "huggingface_hub")
PRECISIONS: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("fp32", "bf16", "fp16")
WORLDS = (1, 2, 4, 8, 16, 32, 64, 128)
T = TypeVar("T")


@dataclass
class Findings:
    """What was found: (what, value) rows to show, lines to paste, and the problems that would stop a run."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    paste: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def attempt(self, check: Callable[[], T]) -> T | None:
        """The check's result; its UserError becomes a problem, so that one run of the doctor shows them all."""
        try:
            return check()
        except UserError as error:
            self.problems.append(str(error))
            return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="a recipe's name or a path to YAML; without it, only the machine")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change values of the recipe")
    parser.add_argument("--fetch", action="store_true", help="download the teachers' weights that are not here")
    parser.add_argument("--fetch-dir", type=Path, default=Path("teachers"), help="where --fetch puts them")
    parser.add_argument("--compositions", action="store_true", help="which method takes which masking and fusion")
    teacher.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """0: ready. 2: something would stop the run. Raises UserError where the recipe itself is wrong."""
    if args.compositions:
        print(compositions.table())
        return 0
    if args.teacher is not None:
        return teacher.run(args)
    if args.recipe is None:
        if args.fetch:
            raise UserError("--fetch without a recipe: name the recipe whose teachers are wanted")
        show("machine", machine().rows)
        return 0
    config = load_recipe(args.recipe, args.overrides)
    found = Findings()
    check_recipe(config, found)
    size = config.data.image_size
    infos = {name: found.attempt(partial(describe, name, teacher, size)) for name, teacher in config.teachers.items()}
    known = {name: info for name, info in infos.items() if info is not None}
    if len(known) == len(infos):
        found.attempt(lambda: method_class(config.method.name).check(config, known))
    for name, info in known.items():
        check_teacher(name, config.teachers[name], info, args.fetch_dir if args.fetch else None, found)
    check_data(config, found)
    show(args.recipe, found.rows)
    show(f"global batch {config.schedule.global_batch}: micro-batch x accumulation by ranks", batch_rows(config))
    if found.paste:
        print("give these to `mimscale train`, or write them into the recipe:")
        print(*found.paste, sep="\n")
    for problem in found.problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 2 if found.problems else 0


# ------------------------------------------------------------------------------------------------ the machine


def machine() -> Findings:
    """Versions, devices and what they can compute, scheduler, space."""
    found = Findings([("python", sys.version.split()[0])])
    found.rows += [(package, _version(package)) for package in PACKAGES]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            device = torch.device("cuda", index)
            found.rows.append((str(device), f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {_formats(device)}"))
    else:
        found.rows.append(("CUDA devices", "none"))
    found.rows.append(("CPU", f"{os.cpu_count()} cores, {_formats(torch.device('cpu'))}"))
    found.rows.append(("pictures", explain(default_decoder())))
    found.rows.append(("with data.decoder=device", device_decode.explain()))
    job = os.environ.get("SLURM_JOB_ID")
    slurm = f"inside job {job}" if job else "here (sbatch found)" if shutil.which("sbatch") else "not here"
    found.rows.append(("SLURM", slurm))
    found.rows.append(("free disk here", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB"))
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _formats(device: torch.device) -> str:
    """The number formats that a run may train in on this device."""
    able = []
    for precision in PRECISIONS:
        try:
            check_precision(device, precision)
            able.append(precision)
        except UserError:
            pass
    return " ".join(able)


# ------------------------------------------------------------------------------------------------ a recipe


def check_recipe(config: RunConfig, found: Findings) -> None:
    student, rows, columns = config.student, *config.grid
    shape = f"{student.width} wide, {student.depth} blocks, {student.heads} heads"
    found.rows.append(("method", config.method.name))
    found.rows.append(("student", f"{shape}, patch {student.patch}, {rows}x{columns} at {config.data.image_size} px"))
    if config.init is not None:
        known = found.attempt(lambda: init_weights.with_sha256(config, None, resumes=False))
        if known is not None and known.init is not None:
            found.rows.append(("starts from", f"{known.init.weights}, sha256 {known.init.sha256}"))
    ds_config = found.attempt(lambda: load_ds_config(config.engine.ds_config))
    if ds_config is None:
        return
    precision = precision_of(ds_config)
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    found.rows.append(("engine", f"{config.engine.ds_config}: ZeRO stage {stage}, {precision}"))
    if torch.cuda.is_available() and config.engine.device != "cpu":
        found.attempt(lambda: check_precision(torch.device("cuda", 0), precision))
    elif config.engine.device == "cpu":
        found.attempt(lambda: check_precision(torch.device("cpu"), precision))
    else:
        found.rows.append(("", "no GPU on this machine: the precision is checked where the run starts"))


def check_teacher(name: str, config: TeacherConfig, info: TeacherInfo, fetch: Path | None, found: Findings) -> None:
    """What the teacher is, whether its weights are here, and with `fetch` (a folder) get them."""
    cls = "with" if info.has_cls else "without"
    grid = f"{info.grid[0]}x{info.grid[1]} at {info.image_size} px"
    found.rows.append((f"teacher {name}", f"{config.library} {config.model}, {config.precision}"))
    found.rows.append(("", f"{info.dim} wide, {info.depth} blocks, {grid}, {cls} class token"))
    if config.random:
        found.rows.append(("", "random weights (a control)"))
        return
    path = found.attempt(lambda: _weights(name, config, fetch))
    if path is None:
        return
    digest = found.attempt(lambda: weights.verify(name, config, path))
    if digest is not None:
        found.rows += [("", str(path)), ("", f"sha256 {digest}")]
        if fetch is not None:
            found.paste.append(f"{shlex.quote(f'teachers.{name}.weights={path}')} teachers.{name}.sha256={digest}")


def _weights(name: str, config: TeacherConfig, fetch: Path | None) -> Path:
    hub = partial(adapter(config.library).hub_file, name, config)
    here = config.weights is not None and (config.weights.is_file() or not weights.names_a_tag(config))
    if fetch is None or here:
        return weights.locate(name, config, hub, may_download=False).absolute()
    file = hub()
    return weights.cached(file) or weights.download(name, file, fetch.absolute() / file.repo.replace("/", "--"))


def check_data(config: RunConfig, found: Findings) -> None:
    manifest = found.attempt(lambda: open_source(config.data))
    if manifest is None:
        return
    steps = manifest.samples // config.schedule.global_batch
    shards = len(manifest.shard_paths)
    decoder = config.data.decoder
    found.rows.append(("pictures", device_decode.explain() if decoder == "device" else explain(decoder)))
    if decoder == "device":
        cuda = torch.cuda.is_available() and config.engine.device != "cpu"
        found.attempt(lambda: device_decode.check(torch.device("cuda" if cuda else "cpu")))
    found.rows.append(("data", f"{manifest.samples} samples in {shards} shards, {steps} steps per epoch"))
    if steps == 0 and config.schedule.steps is None:
        found.problems.append(
            f"schedule.global_batch = {config.schedule.global_batch} exceeds the {manifest.samples} samples of "
            f"{config.data.shards}; lower it, or give schedule.steps instead of schedule.epochs"
        )


def batch_rows(config: RunConfig) -> list[tuple[str, str]]:
    """How the global batch is cut on some numbers of ranks."""
    rows = []
    for world in WORLDS:
        try:
            micro, accumulation = solve_micro_batch(config.schedule.global_batch, world, config.engine.max_micro_batch)
            rows.append((str(world), f"{micro} x {accumulation}"))
        except UserError:
            rows.append((str(world), f"does not divide {config.schedule.global_batch}"))
    return rows


def show(title: str, rows: list[tuple[str, str]]) -> None:
    """A title and a table of two columns on stdout; long paths are folded, never cut."""
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for what, value in rows:
        table.add_row(what, Text(value))
    Console(width=None if sys.stdout.isatty() else 160).print(Text(title), table)
