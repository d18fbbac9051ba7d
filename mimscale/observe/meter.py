"""Sums over a log window. Device scalars are added on the device and read only when the window ends."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


class Meter:
    """Means of the method's scalars over ranks and micro-steps, and where the time went."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._micro_steps = 0
        self._images = 0
        self._waiting_s = 0.0
        self._start_s = time.perf_counter()

    def add(self, scalars: Mapping[str, Tensor], images: int) -> None:
        """scalars: 0-dim tensors of one micro-step of this rank. images: over all ranks."""
        for name, value in scalars.items():
            self._sums[name] = self._sums[name] + value.float() if name in self._sums else value.float()
        self._micro_steps += 1
        self._images += images

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around whatever waits for data."""
        start_s = time.perf_counter()
        yield
        self._waiting_s += time.perf_counter() - start_s

    def read(self) -> dict[str, float]:
        """Means and rates of the window that ends here; starts the next one. Collective; synchronises the device.

        data_wait (share of the time) and memory_gib are those of the rank where they are largest.
        """
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names]) if names else torch.zeros(0, device=self._device)
        ranks = 1
        if dist.is_initialized():
            ranks = dist.get_world_size()
            dist.all_reduce(sums)
        means = dict(zip(names, (sums / max(1, ranks * self._micro_steps)).tolist(), strict=True))
        elapsed_s = time.perf_counter() - self._start_s
        worst = torch.tensor(
            [self._waiting_s / elapsed_s, peak_memory_bytes(self._device) / 2**30], device=self._device
        )
        if dist.is_initialized():
            dist.all_reduce(worst, dist.ReduceOp.MAX)
        wait, memory = worst.tolist()
        rates = {"images_per_s": self._images / elapsed_s, "data_wait": wait, "memory_gib": memory}
        self._reset()
        return {**means, **rates}


def peak_memory_bytes(device: torch.device) -> int:
    """Highest allocation so far: of the GPU, or on a CPU the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Phases:
    """Seconds that each phase before the first step took, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start_s = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start_s, 3)
