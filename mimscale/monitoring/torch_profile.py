"""torch.profiler around a few steps: time and number of kernels, communication, what takes longest, a Chrome trace.

Without a GPU there are no kernels: the operators of the host stand in their place.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

TOP = 15
COMMUNICATION = ("nccl", "c10d::", "gloo:", "record_param_comms")


def profiled(step: Callable[[], object], device: torch.device, steps: int, trace: Path | None = None) -> dict[str, Any]:
    """Figures per step. trace: file for chrome://tracing.

    kernel_ms, kernels: time in kernels and how many (on a CPU: operators, without those that they call). counted: which
    of the two, "kernels" or "operators".
    communication_ms: of it, in collectives; on a GPU it may overlap with other kernels. top: [name, ms, count] each.
    host_top: the same for what the host did.
    """
    with start(device) as run:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    if trace is not None:
        run.export_chrome_trace(str(trace))
    return figures(run, device, steps)


def start(device: torch.device) -> profile:
    """A profiler of the host, and of the device where it is a GPU; not yet started."""
    return profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])])


def figures(run: profile, device: torch.device, steps: int) -> dict[str, Any]:
    """Those of `profiled`, of a profiler that has stopped."""
    cuda = device.type == "cuda"
    entries = [entry for entry in run.key_averages() if not _annotation(entry)]
    host = [_entry(e, e.self_cpu_time_total, steps) for e in entries if not _on_gpu(e)]
    kernels = [_entry(e, e.self_device_time_total, steps) for e in entries if _on_gpu(e)] if cuda else host
    return {
        "kernel_ms": sum(ms for _, ms, _ in kernels),
        "kernels": round(sum(count for _, _, count in kernels)),
        "counted": "kernels" if cuda else "operators",
        "communication_ms": sum(ms for name, ms, _ in kernels if name.lower().startswith(COMMUNICATION)),
        "top": _longest(kernels),
        "host_top": _longest(host),
    }


def _annotation(entry: Any) -> bool:
    """Ranges that span other entries, such as ProfilerStep and Optimizer.step, also where they are shown on a GPU."""
    spans = ("ProfilerStep", "Optimizer.", "## ", "Torch-Compiled")
    return bool(getattr(entry, "is_user_annotation", False)) or str(entry.key).startswith(spans)


def _on_gpu(entry: Any) -> bool:
    return bool(entry.device_type == torch.autograd.DeviceType.CUDA)


def _entry(entry: Any, microseconds: float, steps: int) -> tuple[str, float, float]:
    return str(entry.key), microseconds / 1000 / steps, entry.count / steps


def _longest(entries: list[tuple[str, float, float]]) -> list[list[Any]]:
    longest = sorted(entries, key=lambda entry: -entry[1])[:TOP]
    return [[name[:100], round(ms, 3), round(count, 1)] for name, ms, count in longest]
