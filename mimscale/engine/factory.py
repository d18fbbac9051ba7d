"""The engine that a recipe names, and the process group that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mimscale.config.deepspeed import precision_of
from mimscale.config.run import RunConfig
from mimscale.distributed.world import World
from mimscale.engine import compile, cuda_graphs, deepspeed_runtime, student_fp8, torch_engine
from mimscale.engine.base import Engine
from mimscale.engine.config import EngineConfig
from mimscale.engine.deepspeed_engine import DeepSpeedEngine
from mimscale.engine.torch_engine import TorchEngine
from mimscale.errors import UserError


def check_backend(
    engine: EngineConfig, ds_config: Mapping[str, Any], device: torch.device, accumulation: int = 1
) -> None:
    """Refuse what the backend or the device cannot do, before anything is built. accumulation: micro-batches per step,
    once they are known. Raises UserError.
    """
    if engine.backend == "torch" and precision_of(ds_config) == "fp16":
        raise UserError(
            f"engine.backend = torch has no loss scale for engine.ds_config = {engine.ds_config}, which is fp16; "
            f"use a bf16 or fp32 file, or engine.backend = deepspeed"
        )
    stage = 0 if engine.backend == "torch" else ds_config.get("zero_optimization", {}).get("stage", 0)
    compile.check(engine.compile, stage)
    cuda_graphs.check(engine, device, stage, accumulation)
    if engine.student_fp8:
        student_fp8.check(device, stage, precision_of(ds_config))


def open_process_group(world: World, engine: EngineConfig, timeout_s: float = 1800.0) -> None:
    """nccl on GPUs, gloo on CPUs. DeepSpeed needs a group also where there is one rank."""
    runtime = torch_engine if engine.backend == "torch" else deepspeed_runtime
    runtime.open_process_group(world, timeout_s)


def make_engine(
    method: Any, config: RunConfig, world: World, *, micro_batch: int, accumulation: int, ds_config: Mapping[str, Any]
) -> Engine:
    """`engine.backend` of the recipe, around a method. Collective. Raises UserError."""
    check_backend(config.engine, ds_config, world.device, accumulation)
    precision = precision_of(ds_config)
    if config.engine.backend == "torch" and precision != "fp16":
        return TorchEngine(method, config, world, accumulation=accumulation, precision=precision)
    return DeepSpeedEngine(
        method, config, world, micro_batch=micro_batch, accumulation=accumulation, ds_config=ds_config
    )
