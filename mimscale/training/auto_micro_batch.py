"""`engine.max_micro_batch: auto`: the number that it becomes at the start of a run, the same on every rank."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mimscale.config.run import RunConfig
from mimscale.cost.devices import DEVICES, GIB, INTERCONNECTS
from mimscale.cost.planner import Choice, Planner
from mimscale.distributed.coordination import Coordinator
from mimscale.distributed.micro_batch import solve_micro_batch
from mimscale.distributed.world import World

if TYPE_CHECKING:
    from mimscale.training.checked_run import CheckedRun

ON_CPU = 64
"""A CPU computes no faster in larger micro-batches, and memory is the host's."""
SPARE = 0.06
"""Share of a GPU's memory that is left free: for fragmentation and for what the prediction leaves out."""
CONTEXT = 2 * GIB
"""What CUDA and NCCL take besides torch's allocations."""


def resolved(config: RunConfig, stored: RunConfig | None, world: World) -> RunConfig:
    """The recipe with a number in place of `auto`: that of the run that is resumed, else by this rank's device.

    Raises UserError where the global batch does not divide over the ranks.
    """
    if config.engine.max_micro_batch != "auto":
        return config
    if stored is not None and stored.engine.max_micro_batch != "auto":
        return with_micro_batch(config, stored.engine.max_micro_batch)
    if world.device.type != "cuda":
        return with_micro_batch(config, ON_CPU)
    memory = torch.cuda.get_device_properties(world.device).total_memory
    return with_micro_batch(config, most_that_fits(config, world.size, memory))


def most_that_fits(config: RunConfig, ranks: int, memory: float) -> int:
    """Images per forward pass whose predicted memory fits a GPU with so many bytes; 1 where no number does."""
    planner = planner_for(config, ranks, memory)
    return planner.fill(config.engine.ds_config, config.engine.activation_checkpointing).micro_batch


def planner_for(config: RunConfig, ranks: int, memory: float, kind: str = "cuda") -> Planner:
    """What predicts the memory of a recipe on a GPU (or kind: cpu) with so many bytes, some of which stay free."""
    cpu = kind == "cpu"
    gpu = replace(DEVICES["cpu" if cpu else "h100"], memory=memory, reserved=SPARE * memory + (0 if cpu else CONTEXT))
    return Planner(config, gpu, INTERCONNECTS["ib8x400"], ranks, ranks)


def smaller_that_fits(
    config: RunConfig, ranks: int, micro_batch: int, memory: float, kind: str = "cuda"
) -> tuple[int | None, bool]:
    """(the largest micro-batch below one that ran out of memory whose predicted memory fits, None where none does;
    whether that one fits by prediction too, so that the prediction is too low by an unknown). It is less by an eighth
    at least.
    """
    planner = planner_for(config, ranks, memory, kind)
    engine, per_rank = config.engine, config.schedule.global_batch // ranks

    def fits(images: int) -> bool:
        choice = Choice(engine.ds_config, images, per_rank // images, engine.activation_checkpointing)
        return planner.memory(choice).total <= planner.room

    smaller = (images for images in range(micro_batch * 7 // 8, 0, -1) if per_rank % images == 0)
    return next(filter(fits, smaller), None), fits(micro_batch)


def with_micro_batch(config: RunConfig, images: int) -> RunConfig:
    return config.model_copy(update={"engine": config.engine.model_copy(update={"max_micro_batch": images})})


def solve(config: RunConfig, world: World) -> tuple[int, int]:
    """(micro-batch, accumulation) of a resolved recipe. Raises UserError where the batch does not divide."""
    most = config.engine.max_micro_batch
    assert most != "auto"
    return solve_micro_batch(config.schedule.global_batch, world.size, most)


def agreed(checked: CheckedRun, coordinator: Coordinator) -> CheckedRun:
    """The run with the least of the ranks' micro-batches, where their GPUs differ. Collective."""
    wishes = coordinator.gather((checked.auto_micro_batch, checked.config.engine.max_micro_batch))
    least = min(int(images) for _, images in wishes)
    if not all(auto for auto, _ in wishes) or least == checked.config.engine.max_micro_batch:
        return checked
    config = with_micro_batch(checked.config, least)
    micro_batch, accumulation = solve(config, checked.world)
    return replace(checked, config=config, micro_batch=micro_batch, accumulation=accumulation)
