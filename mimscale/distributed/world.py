"""Ranks and devices: the same code under torchrun, under srun with one task per rank, and as a plain process.

Everything here happens before DeepSpeed is imported, because DeepSpeed picks its accelerator at import.
"""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

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
    """Read torchrun's variables, else those of a bare srun (absent: one plain process), and choose the device.

    Makes a GPU the current device of this process. Raises UserError.
    """
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        _adopt_slurm_step()
    numbers = {name: int(os.environ.get(name, fallback)) for name, fallback in
               (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))}  # fmt: skip
    if numbers["WORLD_SIZE"] > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError(
            f"WORLD_SIZE = {numbers['WORLD_SIZE']} without MASTER_ADDR and MASTER_PORT; start with torchrun or srun"
        )
    cuda = torch.cuda.is_available()
    if wanted == "cuda" and not cuda:
        raise UserError("engine.device = cuda: this process sees no CUDA device; use engine.device=cpu or a GPU node")
    if wanted == "cpu" or not cuda:
        device = torch.device("cpu")
    else:
        local, visible = numbers["LOCAL_RANK"], torch.cuda.device_count()
        if local >= visible and visible > 1:
            raise UserError(f"LOCAL_RANK = {local}, but {visible} GPUs are visible; start one rank per GPU of the node")
        device = torch.device("cuda", local % visible)  # srun may show each task only its own GPU
        torch.cuda.set_device(device)
    return World(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"], device)


def _adopt_slurm_step() -> None:
    """Give a task of a bare `srun python -m mimscale ...` the variables that torchrun would have set."""
    job = os.environ
    hosts = subprocess.run(
        ["scontrol", "show", "hostnames", job["SLURM_STEP_NODELIST"]], capture_output=True, text=True, check=True
    )
    job["RANK"], job["LOCAL_RANK"] = job["SLURM_PROCID"], job["SLURM_LOCALID"]
    job["WORLD_SIZE"] = job["SLURM_STEP_NUM_TASKS"]
    job["LOCAL_WORLD_SIZE"] = job.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]  # such as 8(x4),2
    job.setdefault("MASTER_ADDR", hosts.stdout.split()[0])
    job.setdefault("MASTER_PORT", str(20000 + int(job["SLURM_JOB_ID"]) % 20000))


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
