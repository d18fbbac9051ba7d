"""What this machine's device can do: its row in the table of devices, and the rate of a large product, measured."""

from __future__ import annotations

import time
from typing import Literal

import torch

from mimscale.cost.devices import DEVICES, GIB

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIDES = {"cuda": 8192, "cpu": 384}
REPEATS = 3


def row_of(name: str, memory: float = 0.0) -> str | None:
    """Name in the table of devices of what a driver calls a GPU, None where the table has no row for it.

    memory: bytes; A100s come with 40 and with 80 GB. PCIe cards and cut-down variants have other peaks and no row.
    """
    words = name.upper().replace("-", " ").split()
    if "PCIE" in words or "NVL" in words:
        return None
    key = next((key for key in ("h200", "h100", "a100", "v100") if key.upper() in words), None)
    return "a100-40" if key == "a100" and 0 < memory < 60 * GIB else key


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """FLOP/s of the device by its data sheet (`mimscale.cost.devices`); None where it is not in the table."""
    if device.type != "cuda":
        return None  # what a core can do varies with the machine; `measured_flops` is the measure on a CPU
    key = row_of(torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory)
    return None if key is None else DEVICES[key].peak.get(precision)


def measured_flops(device: torch.device, precision: Precision) -> float:
    """FLOP/s of the best of a few products of square matrices (8192 on a GPU, some 3 ms in 16 bit). Waits for the
    device; not for use inside a step. A CPU multiplies in fp32, on as many threads as the run has.
    """
    side = SIDES[device.type]
    dtype = DTYPES[precision] if device.type == "cuda" else torch.float32
    random = torch.Generator(device).manual_seed(0)  # a GPU multiplies ones faster than other numbers
    a = torch.randn(side, side, dtype=dtype, device=device, generator=random)
    out = torch.empty_like(a)
    torch.mm(a, a, out=out)  # chooses the kernel
    best_s = min(_seconds(a, out) for _ in range(REPEATS))
    return 2 * side**3 / best_s


def _seconds(a: torch.Tensor, out: torch.Tensor) -> float:
    if a.device.type != "cuda":
        start_s = time.perf_counter()
        torch.mm(a, a, out=out)
        return time.perf_counter() - start_s
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    torch.mm(a, a, out=out)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000
