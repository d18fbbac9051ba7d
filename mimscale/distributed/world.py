"""Ranks and devices: the same code under torchrun, srun or mpirun with one task per rank, and as a plain process.

Everything here happens before DeepSpeed is imported, because DeepSpeed picks its accelerator at import.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from mimscale.distributed import launcher
from mimscale.errors import UserError

EMULATE_FP16 = "MIMSCALE_EMULATE_FP16"


@dataclass(frozen=True)
class World:
    """This process's place among the ranks, and its device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device


def from_environment(wanted: Literal["auto", "cuda", "cpu"]) -> World:
    """Read the launcher's variables (`launcher.adopt`; absent: one plain process), and choose the device.

    Makes a GPU the current device of this process. Raises UserError.
    """
    found = launcher.adopt()
    cuda = torch.cuda.is_available()
    if wanted == "cuda" and not cuda:
        raise UserError("engine.device = cuda: this process sees no CUDA device; use engine.device=cpu or a GPU node")
    if wanted == "cpu" or not cuda:
        device = torch.device("cpu")
    else:
        local, visible = found.local_rank, torch.cuda.device_count()
        if local is None and visible > 1:
            raise UserError(f"LOCAL_RANK is not set, but {visible} GPUs are visible; {launcher.START}")
        local = local or 0
        if local >= visible > 1:
            raise UserError(f"LOCAL_RANK = {local}, but {visible} GPUs are visible; start one rank per GPU of the node")
        device = torch.device("cuda", local % visible)  # srun may show each task only its own GPU
        torch.cuda.set_device(device)
    return World(found.rank, found.size, found.local_rank or 0, device)


def check_precision(
    device: torch.device, precision: Literal["fp32", "bf16", "fp16"], what: str = "engine.ds_config"
) -> None:
    """Refuse a number format that the device lacks. Raises UserError."""
    if precision == "fp16" and device.type == "cpu" and not _cpu_has_fp16():
        raise UserError(f"{what} asks for fp16, which this CPU lacks; use bf16 or fp32")
    if precision == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"{what} asks for bf16, which {name} lacks (compute capability 8.0); use fp16")


def _cpu_has_fp16() -> bool:
    if os.environ.get(EMULATE_FP16):
        return True
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())  # the same question that DeepSpeed asks
    except (AttributeError, RuntimeError):
        return False


def close_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
