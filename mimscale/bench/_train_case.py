"""One training step, measured: the real engine, method and teachers, on synthetic images or on real shards."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mimscale.bench import _synthetic
from mimscale.bench._phases import PhaseMarks
from mimscale.checkpoint.host_buffer import HostBuffer
from mimscale.config.compiler import use_cache_dir
from mimscale.config.deepspeed import load_ds_config, precision_of
from mimscale.config.recipes import validate
from mimscale.config.run import RunConfig
from mimscale.cost import peak
from mimscale.cost.flops import arithmetic_of, flops_of
from mimscale.data.augment import DeviceAugmentation
from mimscale.data.device_prefetch import DevicePrefetcher
from mimscale.data.loader import TrainLoader
from mimscale.data.wds_stream import open_source
from mimscale.distributed.world import World, check_precision, from_environment
from mimscale.engine.factory import check_backend, open_process_group
from mimscale.fault_tolerance.step_guard import StepGuard
from mimscale.monitoring import torch_profile
from mimscale.teachers.ensemble import TeacherEnsemble, build_skeletons, describe
from mimscale.teachers.fidelity import cosine
from mimscale.teachers.prefetcher import TeacherPrefetcher
from mimscale.training import setup
from mimscale.training.checked_run import check_teachers
from mimscale.types import PrefetchedBatch, StepInfo

GIB = 2**30
LR = 1e-6
COMPARED_IMAGES = 16
PHASES = ("data", "teacher", "forward", "backward", "update", "after")


@dataclass(frozen=True)
class Options:
    """micro_batch: images per rank and forward pass; None: the recipe's. data: real shards instead of synthetic images.
    pretrained: the teachers' weights instead of random ones. save: how long a checkpoint stalls the step. trace: file
    for the profile's Chrome trace, if any.
    """

    micro_batch: int | None = None
    accumulation: int = 1
    warm_up: int = 4
    repeats: int = 3
    steps: int = 8
    data: bool = False
    pretrained: bool = False
    profile: bool = False
    save: bool = False
    trace: Path | None = None


def prepared(config: RunConfig, options: Options, ranks: int) -> RunConfig:
    """The recipe for a measurement: the batch of one step, a constant learning rate, masks as after AMT's warm-up,
    teachers with random weights unless `pretrained`, a random start. Raises UserError.
    """
    values = config.dump()
    limit = config.engine.max_micro_batch
    micro_batch = options.micro_batch or (64 if limit == "auto" else int(limit))
    batch = micro_batch * options.accumulation * ranks
    values["schedule"] = {"steps": 10**6, "global_batch": batch, "base_lr": LR}
    values["engine"]["max_micro_batch"] = micro_batch
    values["init"] = None
    if "warmup_epochs" in (values["method"].get("masking") or {}):
        values["method"]["masking"]["warmup_epochs"] = 0.0
    if not options.pretrained:
        for teacher in values["teachers"].values():
            teacher["random"] = True
    return validate(values, source="the measured recipe")


class TrainStep:
    """Everything that a step needs, built as `mimscale.training.setup` builds it. Collective."""

    def __init__(self, config: RunConfig, options: Options, world: World, closing: ExitStack) -> None:
        self.config, self.world, self.options = config, world, options
        ds_config = load_ds_config(config.engine.ds_config)
        check_precision(world.device, precision_of(ds_config))
        self.precision = arithmetic_of(config, precision_of(ds_config))
        check_backend(config.engine, ds_config, world.device)
        check_teachers(config, world.device)
        self.micro_batch = int(config.engine.max_micro_batch)
        skeletons = build_skeletons(config.teachers, config.data.image_size)
        self.method = setup.make_method(config, describe(skeletons))
        needs = self.method.needs
        fused = config.engine.uses("teacher_kernels")
        self.teachers = TeacherEnsemble(
            config.teachers, skeletons, needs.teachers, config.data.image_size, world.device, fused
        )
        self.parameters = sum(parameter.numel() for parameter in self.method.parameters())
        open_process_group(world, config.engine)
        source = open_source(config.data, world.size) if options.data else None
        self.engine = setup.connect(
            self.method,
            self.teachers,
            config,
            world,
            micro_batch=self.micro_batch,
            accumulation=options.accumulation,
            ds_config=ds_config,
            samples=_synthetic.SAMPLES if source is None else source.samples,
        )
        closing.callback(self.engine.close)
        self.guard = StepGuard(config.guard, options.accumulation, world.device)
        self.batches = TeacherPrefetcher(
            self.teachers,
            world.device,
            self._synthetic() if source is None else self._loaded(source, closing),
            ahead=config.engine.teachers_ahead,
            prepare=self.method.prepare,
        )
        self.step_number = 0

    def _synthetic(self) -> Iterator[PrefetchedBatch]:
        accumulation, device = self.options.accumulation, self.world.device
        return _synthetic.batches(self.config, self.method.needs, self.micro_batch, accumulation, device)

    def _loaded(self, source: Any, closing: ExitStack) -> Iterator[PrefetchedBatch]:
        config, world = self.config, self.world
        loader = TrainLoader(
            source,
            config.data,
            self.method.needs,
            seed=config.seed,
            global_batch=config.schedule.global_batch,
            micro_batch=self.micro_batch,
            rank=world.rank,
            world=world.size,
            pin=world.device.type == "cuda",
        )
        closing.callback(loader.close)
        augment = DeviceAugmentation(config.data, self.method.needs.mixing, self.micro_batch)
        return DevicePrefetcher(iter(loader), world.device, augment)

    def __call__(self, mark: Callable[[str], None] = lambda phase: None) -> StepInfo:
        """`mimscale.training.loop.train_step`, which enters each phase of PHASES as it begins."""
        scalars = []

        def between(loss: torch.Tensor) -> torch.Tensor:
            mark("backward")
            return self.guard.check_loss(loss)

        for _ in range(self.options.accumulation):
            mark("data")
            self.batches.next_batch()
            mark("teacher")
            batch, targets = self.batches.targets()
            mark("forward")
            scalars.append(self.engine.forward_backward(batch, targets, between))
        mark("update")
        skipped = self.engine.step(LR, self.guard.clip(self.config.optim.clip))
        mark("after")
        self.step_number += 1
        info = StepInfo(self.step_number, 10**6, skipped, tuple(scalars), batch, targets, self.engine.parameters)
        self.method.after_step(info)
        return info


def measure(config: RunConfig, options: Options) -> dict[str, Any]:
    """Figures of a recipe's training step on this rank's device; see docs/benchmarks.md for each. Collective."""
    use_cache_dir()
    world = from_environment(config.engine.device)
    config = prepared(config, options, world.size)
    with ExitStack() as closing:
        return _measure(TrainStep(config, options, world, closing), options)


def _measure(step: TrainStep, options: Options) -> dict[str, Any]:
    device, config = step.world.device, step.config
    flops = flops_of(config)
    rate = peak.measured_flops(device, step.precision)
    start_s = time.perf_counter()
    for _ in range(options.warm_up):
        step()
    _wait(device)
    warm_up_s = time.perf_counter() - start_s
    seconds, host_s = [], []
    for _ in range(options.repeats):
        start_s = time.perf_counter()
        for _ in range(options.steps):
            info = step()
        host_s.append((time.perf_counter() - start_s) / options.steps)
        _wait(device)
        seconds.append((time.perf_counter() - start_s) / options.steps)
    images = config.schedule.global_batch
    rates = sorted(images / spent for spent in seconds)
    per_rank = statistics.median(rates) / step.world.size * flops.training
    known = peak.peak_flops(device, step.precision)
    device_ms, launch_ms = _breakdown(step, options.steps)
    result = {
        "images_per_s": statistics.median(rates),
        "images_per_s_min": rates[0],
        "images_per_s_max": rates[-1],
        "step_ms": 1000 * statistics.median(seconds),
        "host_ms": 1000 * statistics.median(host_s),
        "host_share": _host_share(device, device_ms, launch_ms),
        "mfu": None if known is None else per_rank / known,
        "mfu_measured": per_rank / rate,
        "peak_tflops": None if known is None else known / 1e12,
        "product_tflops": rate / 1e12,
        "gflop_per_image": {part: value / 1e9 for part, value in flops.by_part().items()},
        "device_ms": device_ms,
        "launch_ms": launch_ms,
        "memory": _memory(device),
        "loss": float(info.loss),
        "skipped": step.engine.skipped_steps,
        "warm_up_s": warm_up_s,
        "parameters_millions": step.parameters / 1e6,
        "micro_batch": step.micro_batch,
        "accumulation": options.accumulation,
        "rank": step.world.rank,
        "ranks": step.world.size,
        "precision": step.precision,
        "on_gpu": device.type == "cuda",
        "notes": [*step.teachers.notes, *step.engine.notes],
    }
    if options.profile or step.world.size > 1:
        found = torch_profile.profiled(step, device, 3 if options.profile else 1, options.trace)
        result["communication_ms"] = found["communication_ms"]
        if options.profile:
            result["profile"] = found
    if options.save:
        result |= _stall(step)
    cosines = _teacher_cosines(step, info)
    return result | ({"teacher_cosine": cosines} if cosines else {})


def _teacher_cosines(step: TrainStep, info: StepInfo) -> dict[str, float]:
    """Of each teacher below fp32: mean cosine of the features that the student learned from in a step with those of the
    same weights in fp32, on the level where it is lowest.
    """
    config, images, found = step.config, info.batch.images[:COMPARED_IMAGES], {}
    for name, teacher in config.teachers.items():
        levels = info.targets[name].levels if name in info.targets else {}
        if teacher.precision == "fp32" or teacher.shard or not levels:
            continue
        exact = {name: teacher.model_copy(update={"precision": "fp32", "compile": False})}
        needs = {name: step.method.needs.teachers[name]}
        side, device = config.data.image_size, step.world.device
        reference = TeacherEnsemble(exact, build_skeletons(exact, side), needs, side, device)
        with torch.no_grad():
            theirs = reference(images)[name].levels
        found[name] = min(cosine(ours[: len(images)], theirs[level])[0] for level, ours in levels.items())
    return found


def _stall(step: TrainStep) -> dict[str, float]:
    """What a save costs the step: the copy of weights and state to host memory. The rest is done beside training."""
    live = {**step.engine.fragments(), **step.method.fragments()}
    copy = HostBuffer(live)
    seconds = []
    for _ in range(3):
        _wait(step.world.device)
        start_s = time.perf_counter()
        copy.fill(live)
        seconds.append(time.perf_counter() - start_s)
    return {"save_stall_ms": 1000 * statistics.median(seconds), "save_gib": copy.bytes / GIB}


def _breakdown(step: TrainStep, steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """Phase -> ms of the device per step, and of the host."""
    marks = PhaseMarks(step.world.device)
    for _ in range(steps):
        step(marks.mark)
        marks.end()
    device_ms, host_ms = marks.read()
    per_step = [{phase: found.get(phase, 0.0) / steps for phase in PHASES} for found in (device_ms, host_ms)]
    return per_step[0], per_step[1]


def _host_share(device: torch.device, device_ms: dict[str, float], launch_ms: dict[str, float]) -> float | None:
    """The host's time to hand over forward and backward pass over the device's time for them; 1: the device waits."""
    if device.type != "cuda":
        return None
    phases = ("forward", "backward")
    return min(1.0, sum(launch_ms[phase] for phase in phases) / sum(device_ms[phase] for phase in phases))


def _memory(device: torch.device) -> dict[str, float]:
    """GiB: allocated and reserved at most on a GPU; the process's resident set on a CPU."""
    if device.type != "cuda":
        return {"resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    return {
        "allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
