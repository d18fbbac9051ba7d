"""Sums over a log window. Device scalars are added on the device and read only when the window ends."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

GIB = 2**30


@dataclass(frozen=True)
class StepCost:
    """flops: of one image of training, 0 where not counted. ranks: that share the images. peak, product: FLOP/s of a
    device by its data sheet, and measured with a large product; None where not known.
    """

    flops: float = 0.0
    ranks: int = 1
    peak: float | None = None
    product: float | None = None

    def mfu(self, images_per_s: float) -> dict[str, float]:
        """Model FLOPs utilisation: share of the peak (mfu) and of the measured product (mfu_measured), where known."""
        rate = self.flops * images_per_s / self.ranks
        against = {"mfu": self.peak, "mfu_measured": self.product}
        return {name: rate / limit for name, limit in against.items() if limit and rate}


class ThroughputMeter:
    """Means of the method's scalars over ranks and micro-steps, and where the time went.

    waited_s: returns the seconds that this rank has waited for data so far. host_share: `PhaseTimer.host_share`. cost:
    for MFU.
    """

    def __init__(
        self,
        device: torch.device,
        waited_s: Callable[[], float] = lambda: 0.0,
        host_share: Callable[[], float | None] = lambda: None,
        cost: StepCost = StepCost(),
    ) -> None:
        self._device, self._waited_s, self._host_share, self._cost = device, waited_s, host_share, cost
        self.restart()

    def restart(self) -> None:
        """A new window, without reading the one before."""
        self._sums: dict[str, Tensor] = {}
        self._micro_steps = 0
        self._images = 0
        self._start_s, self._waited_before_s = time.perf_counter(), self._waited_s()

    def leave_out(self, seconds: float) -> None:
        """Time of this window that was not spent on training."""
        self._start_s += seconds

    def add(self, scalars: Mapping[str, Tensor], images: int) -> None:
        """scalars: 0-dim tensors of one micro-step of this rank. images: over all ranks."""
        for name, value in scalars.items():
            self._sums[name] = self._sums[name] + value.float() if name in self._sums else value.float()
        self._micro_steps += 1
        self._images += images

    def read(self) -> dict[str, float]:
        """Means and rates of the window that ends here; starts the next one. Collective; synchronises the device.

        data_wait (share of the time), host_share, memory (GiB, at most so far) and power_w are those of the rank where
        they are largest; the last three and mfu are left out where they are not known.
        """
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names]) if names else torch.zeros(0, device=self._device)
        ranks = 1
        if dist.is_initialized():
            ranks = dist.get_world_size()
            dist.all_reduce(sums)
        means = dict(zip(names, (sums / max(1, ranks * self._micro_steps)).tolist(), strict=True))
        elapsed_s = time.perf_counter() - self._start_s
        waited = (self._waited_s() - self._waited_before_s) / elapsed_s
        images_per_s = self._images / elapsed_s
        own = {"data_wait": waited, "memory_gib": peak_memory_bytes(self._device) / GIB}
        if self._device.type == "cuda":
            own["memory_reserved_gib"] = torch.cuda.max_memory_reserved(self._device) / GIB
            own["host_share"] = -1.0 if (share := self._host_share()) is None else share
            own["power_w"] = power_w(self._device)
        worst = torch.tensor(list(own.values()), device=self._device)
        if dist.is_initialized():
            dist.all_reduce(worst, dist.ReduceOp.MAX)
        found = {name: value for name, value in zip(own, worst.tolist(), strict=True) if value >= 0}
        self.restart()
        return {**means, "images_per_s": images_per_s, **self._cost.mfu(images_per_s), **found}


def peak_memory_bytes(device: torch.device) -> int:
    """Highest allocation so far: of the GPU, or on a CPU the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def power_w(device: torch.device) -> float:
    """What the GPU draws now, by NVML; -1 where NVML does not say or its Python package is missing."""
    with suppress(Exception):  # of several libraries and drivers, none of which may end a run
        return float(torch.cuda.power_draw(device)) / 1000
    return -1.0


class StartupTimer:
    """What the time until the first step goes into, from the start of the process, in order and without a gap.

    seconds, cpu_s: phase -> time that passed, and time of this process's threads in it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_s: dict[str, float] = {}
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        self._wall_s, self._cpu_s = ticks / os.sysconf("SC_CLK_TCK"), 0.0  # since the machine started

    def end(self, name: str) -> None:
        """What was done since the last call, or since the process started, was this phase, or more of it."""
        wall_s, cpu_s = time.clock_gettime(time.CLOCK_BOOTTIME), time.process_time()
        for taken, spent_s in ((self.seconds, wall_s - self._wall_s), (self.cpu_s, cpu_s - self._cpu_s)):
            taken[name] = round(taken.get(name, 0.0) + spent_s, 3)
        self._wall_s, self._cpu_s = wall_s, cpu_s

    def move(self, phase: str, name: str, seconds: float) -> None:
        """Show a part of a phase that has ended as a phase of its own, if it took any time."""
        if seconds:
            self.seconds[name] = round(min(seconds, self.seconds[phase]), 3)
            self.seconds[phase] = round(self.seconds[phase] - self.seconds[name], 3)
