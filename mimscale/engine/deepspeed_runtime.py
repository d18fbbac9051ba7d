"""DeepSpeed as a library: imported with its accelerator chosen, and its process group."""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta
from typing import Any

import torch

from mimscale.distributed.world import EMULATE_FP16, World, free_port


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed with its accelerator chosen, and without its shared-memory op.

    That op is compiled at start-up on a CPU (a minute or two) and serves only an all-reduce for inference. With
    EMULATE_FP16 in the environment DeepSpeed also accepts fp16 on a CPU without native fp16 arithmetic, where torch
    computes it, slowly: enough to test the path of the loss scaler anywhere.
    """
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    import deepspeed
    import deepspeed.ops
    import deepspeed.utils.nvtx

    deepspeed.utils.nvtx.enable_nvtx = False  # a range around each of a thousand calls per step
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed 0.19 calls these two collectives, which recent releases of torch have renamed; each rank would log it
    names = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", message=names, category=FutureWarning)
    logging.getLogger("DeepSpeed").addFilter(_says_something)
    accelerator = deepspeed.accelerator.get_accelerator()
    if device.type == "cpu":  # it would start a process, numactl, for each bucket of gradients
        devices = accelerator.device_count()
        accelerator.device_count = lambda: devices
        if os.environ.get(EMULATE_FP16):
            accelerator.is_fp16_supported = lambda: True
    return deepspeed


def _says_something(record: logging.LogRecord) -> bool:
    """DeepSpeed calls each optimiser untested that it does not know; ours are tested at every stage."""
    return "untested optimizer" not in record.getMessage()


def open_process_group(world: World, timeout_s: float = 1800.0) -> None:
    """nccl on GPUs, gloo on CPUs. A plain process becomes a group of one."""
    for name, value in (("RANK", world.rank), ("WORLD_SIZE", world.size), ("LOCAL_RANK", world.local_rank)):
        os.environ[name] = str(value)
    if world.size == 1:  # whatever an outer launcher left behind
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ["MASTER_PORT"] = str(free_port())
    deepspeed = import_deepspeed(world.device)
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout_s)
    )
