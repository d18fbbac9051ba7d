"""Every check that needs no other rank, before anything is built: recipe, machine, teachers, run folder, data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mimscale.checkpoint import format as checkpoint
from mimscale.checkpoint import run_folder
from mimscale.config.compiler import use_cache_dir
from mimscale.config.deepspeed import load_ds_config, precision_of
from mimscale.config.run import RunConfig, method_class
from mimscale.data.wds_stream import Source, open_source
from mimscale.distributed.world import World, check_precision, from_environment
from mimscale.engine.factory import check_backend
from mimscale.errors import UserError
from mimscale.fault_tolerance.retrying_writer import RetryingWriter
from mimscale.monitoring import tracker
from mimscale.monitoring.damage_log import DamageLog, default_limit
from mimscale.optim import lr_schedule
from mimscale.teachers.base import Teacher
from mimscale.teachers.ensemble import build_skeletons, check_compiled, describe
from mimscale.teachers.quantise import check as check_quantised
from mimscale.training import init_weights
from mimscale.training.auto_micro_batch import resolved, solve
from mimscale.types import TeacherInfo

if TYPE_CHECKING:
    from mimscale.evals.while_training import CheckedEvals


@dataclass(frozen=True)
class CheckedRun:
    """A run that passed every check that needs no other rank.

    config: the resolved recipe. parent: the checkpoint whose weights a fork starts from. fresh: whether there is no
    checkpoint of this run to continue from. ds_config: DeepSpeed's JSON, parsed. micro_batch: images per rank and
    forward pass; accumulation: micro-batches per optimiser step. skeletons: every teacher on the meta
    device, for `TeacherEnsemble`. command: for launches.jsonl. auto_micro_batch: whether the micro-batch is solved from
    the memory of this rank's device (`auto_micro_batch.agreed`). evals: what is measured while it trains.
    recipe: its name or path, for launches.jsonl.
    """

    config: RunConfig
    run_dir: Path
    parent: Path | None
    fresh: bool
    world: World
    ds_config: Mapping[str, Any]
    micro_batch: int
    accumulation: int
    manifest: Source
    skeletons: Mapping[str, Teacher]
    steps_per_epoch: int
    total_steps: int
    command: tuple[str, ...]
    auto_micro_batch: bool = False
    evals: CheckedEvals | None = None
    recipe: str | None = None

    @property
    def teachers(self) -> dict[str, TeacherInfo]:
        return describe(self.skeletons)

    def lr(self, step: int) -> float:
        """The peak group's learning rate for optimiser step `step`, from 0."""
        return lr_schedule.lr_at_step(self.config.schedule, step, self.steps_per_epoch, self.total_steps)


def prepare(
    config: RunConfig, run_dir: Path, fork: Path | None, command: tuple[str, ...], recipe: str | None = None
) -> CheckedRun:
    """Every check, before a process group is opened. Raises UserError."""
    use_cache_dir()
    folders = [run_dir, *([fork] if fork is not None else [])]
    run_folder.check_names(*folders)
    world = from_environment(config.engine.device)
    if world.rank == 0:  # its refusal ends the launch, and one rank is enough to list a folder on a shared disk
        run_folder.refuse_special_files(*folders)
        tracker.check(config.log)
    ds_config = load_ds_config(config.engine.ds_config)
    check_precision(world.device, precision_of(ds_config))
    check_backend(config.engine, ds_config, world.device)
    skeletons = build_skeletons(config.teachers, config.data.image_size)
    check_teachers(config, world.device)
    method_class(config.method.name).check(config, describe(skeletons))

    stored = run_folder.existing_run(run_dir)
    parent = None
    if fork is not None:
        if os.path.realpath(fork) == os.path.realpath(run_dir):
            raise UserError(f"--fork {fork} is --run-dir itself; name a new folder for the new run")
        parent = checkpoint.newest(run_dir)
        if parent is None:
            raise UserError(f"--fork: {run_dir} has no checkpoint to start from; let it save one first")
        if config.init is not None:
            raise UserError(f"--fork starts from {run_dir} and init.weights from {config.init.weights}; set init=null")
        run_dir, stored = fork, run_folder.existing_run(fork)
    fresh = not checkpoint.steps(run_dir / "checkpoints") and not checkpoint.damaged(run_dir / "checkpoints")
    config = init_weights.with_sha256(config, stored, resumes=not fresh)
    if stored is not None:
        run_folder.refuse_changes(stored, config, run_dir)
        config = run_folder.compiled_as_before(stored, config)
    if run_folder.stop_wish(run_dir).exists():
        raise UserError(f"{run_folder.stop_wish(run_dir)} asks this run to stop; remove it to go on")

    auto_micro_batch = config.engine.max_micro_batch == "auto"
    config = resolved(config, stored, world)
    micro_batch, accumulation = solve(config, world)
    check_backend(config.engine, ds_config, world.device, accumulation)
    method_class(config.method.name).check_batch(config, micro_batch * world.size)
    manifest = open_source(config.data, world.size)
    check_classes(config, manifest)
    steps_per_epoch = manifest.samples // config.schedule.global_batch
    if config.schedule.steps is None and steps_per_epoch == 0:
        raise UserError(
            f"schedule.global_batch = {config.schedule.global_batch} exceeds the {manifest.samples} samples of "
            f"{config.data.shards}; lower it, or give schedule.steps instead of schedule.epochs"
        )
    damage_log = open_damage_log(config, run_dir, manifest)
    if damage_log.full:
        raise UserError(damage_log.verdict())
    total = config.schedule.steps or round((config.schedule.epochs or 0) * steps_per_epoch)
    steps_per_epoch = max(1, steps_per_epoch)
    if total <= config.schedule.warmup_epochs * steps_per_epoch:
        raise UserError(
            f"the run has {total} steps and a warm-up of schedule.warmup_epochs = {config.schedule.warmup_epochs} "
            f"({config.schedule.warmup_epochs * steps_per_epoch:g} steps); lengthen the one or shorten the other"
        )
    profile = config.log.profile
    if profile is not None and profile.at > total:
        raise UserError(f"log.profile.at = {profile.at} is behind the last step, {total}; choose an earlier one")
    return CheckedRun(
        config,
        run_dir,
        parent,
        fresh,
        world,
        ds_config,
        micro_batch,
        accumulation,
        manifest,
        skeletons,
        steps_per_epoch,
        total,
        command,
        auto_micro_batch,
        check_evals(config, manifest),
        recipe,
    )


def check_evals(config: RunConfig, manifest: Source) -> CheckedEvals | None:
    """Open and check what the section `evals` names. Raises UserError."""
    if config.evals is None:
        return None
    from mimscale.evals.top1_training import check as check_top1
    from mimscale.evals.while_training import prepare as prepare_evals  # torchmetrics takes a second

    found = prepare_evals(config.evals, config.data, manifest, config.schedule.global_batch, config.seed)
    check_top1(config, found.val.manifest)
    return found


def check_classes(config: RunConfig, manifest: Source) -> None:
    """Raises UserError where the method has outputs for another number of classes than the data set has."""
    if manifest.labels is not None:
        classes = len(manifest.classes) if manifest.classes is not None else int(manifest.labels.max()) + 1
        method_class(config.method.name).check_classes(config, classes)


def check_teachers(config: RunConfig, device: torch.device) -> None:
    """Whether the device can compute the teachers' number formats, and compile them. Raises UserError."""
    for name, teacher in config.teachers.items():
        if device.type == "cuda" or teacher.shard:
            check_precision(device, teacher.storage, f"teachers.{name}.precision")
            check_quantised(name, teacher.precision, device)
        check_compiled(name, teacher, device)


def open_damage_log(
    config: RunConfig, run_dir: Path, manifest: Source, writer: RetryingWriter | None = None
) -> DamageLog:
    """What is known of damaged samples in a run's folder."""
    limit = config.data.max_damaged
    return DamageLog(run_dir / "damaged.jsonl", default_limit(manifest.samples) if limit is None else limit, writer)
