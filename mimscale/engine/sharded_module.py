"""A frozen module that one device cannot hold: its parameters split over the ranks, gathered while they are used."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mimscale.distributed.world import World
from mimscale.engine.deepspeed_runtime import import_deepspeed

FLAGS = {torch.float32: {}, torch.bfloat16: {"bf16": {"enabled": True}}, torch.float16: {"fp16": {"enabled": True}}}


def split_over_ranks(module: nn.Module, world: World, whole_below: int = 100_000) -> Any:
    """Split a module on the CPU over all ranks (ZeRO-3 without an optimiser); the result is called in its place.

    Every rank must call it equally often, because a call gathers. Parameters keep their precision and buffers theirs.
    whole_below: parameters with fewer elements stay whole on every rank. At no time is the whole module on a device.
    """
    deepspeed = import_deepspeed(world.device)
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,  # asked for, not used
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": whole_below},
        "steps_per_print": 10**12,
        "timers": {"throughput": {"enabled": False}},
        **FLAGS[next(module.parameters()).dtype],
    }
    deepspeed.zero.Init(module=module, config_dict_or_path=ds_config)
    module.to(world.device)  # the buffers; of the parameters only this rank's part is left
    engine, *_ = deepspeed.initialize(model=module, config=ds_config, dist_init_required=False)
    return engine
