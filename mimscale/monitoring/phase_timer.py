"""What a rank is at and how long it takes: one clock for watchdog, throughput and comparison of ranks."""

from __future__ import annotations

import platform
import time
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from mimscale.distributed.coordination import Coordinator

WAITING, FORWARD, BACKWARD = "waiting for data", "forward pass", "backward pass and step"
BETWEEN, SAVING, EVALUATING = "between steps", "the last save", "evaluation"
SLOW = 1.5  # times the median step of the ranks
WAITS = 0.25  # share of the time


class PhaseTimer:
    """phase: what the rank is at. seconds: phase -> time spent in it so far. ids: samples of the step under way.

    A forward pass is a rank's own work (under ZeRO-3 it also waits for the others' weights). On a GPU its time is that
    of the last one before a comparison, taken by events, so that nothing waits for the device in between.
    """

    def __init__(self, device: torch.device) -> None:
        self.phase, self.ids = "start", list[Tensor]()
        self.seconds, self._compared = defaultdict[str, float](float), defaultdict[str, float](float)
        cuda = device.type == "cuda"
        self._events = {p: torch.cuda.Event(enable_timing=True) for p in (FORWARD, BACKWARD)} if cuda else {}
        self._mark_s = self._lap_s = self._compared_s = time.perf_counter()
        self._launch_s = 0.0  # the host's time for the last forward pass

    def enter(self, phase: str) -> None:
        now_s = time.perf_counter()
        self.seconds[self.phase] += now_s - self._mark_s
        if self.phase == FORWARD:
            self._launch_s = now_s - self._mark_s
        self.phase, self._mark_s = phase, now_s
        if phase in self._events:
            self._events[phase].record()

    def host_share(self) -> float | None:
        """The host's time to hand over the last forward pass, teachers included, as a share of the device's time for
        it: near 1 the device waits for the host. None on a CPU, and while the device is not that far; never waits.
        """
        if not self._events or not self._events[BACKWARD].query():
            return None
        device_s = self._events[FORWARD].elapsed_time(self._events[BACKWARD]) / 1000
        return min(1.0, self._launch_s / device_s) if device_s > 0 else None

    def lap(self) -> float:
        """Seconds since the last call."""
        before_s, self._lap_s = self._lap_s, time.perf_counter()
        return self._lap_s - before_s

    def compare(self, coordinator: Coordinator) -> list[str]:
        """A line for each rank that was slow, or waited, since the last call. Collective."""
        spent = {phase: self.seconds[phase] - self._compared[phase] for phase in (FORWARD, WAITING)}
        if self._events:
            self._events[BACKWARD].synchronize()
            spent[FORWARD] = self._events[FORWARD].elapsed_time(self._events[BACKWARD]) / 1000
        now_s = time.perf_counter()
        mine = (platform.node(), spent[FORWARD], spent[WAITING], now_s - self._compared_s)
        self._compared, self._compared_s = self.seconds.copy(), now_s
        return named(coordinator.gather(mine))


def named(ranks: Sequence[tuple[str, float, float, float]]) -> list[str]:
    """(host, seconds of forward passes, of waiting for data, in all) of each rank -> a line for each that is slow."""
    own = sorted(rank[1] for rank in ranks)
    median = own[len(own) // 2] if len(own) % 2 else (own[len(own) // 2 - 1] + own[len(own) // 2]) / 2
    lines = []
    for rank, (host, own_s, waiting_s, total_s) in enumerate(ranks):
        if own_s > SLOW * median:
            lines.append(f"rank {rank} on {host} is slow: its forward passes take {own_s / median:.1f} x the median")
        if waiting_s > WAITS * total_s > 0:
            lines.append(f"rank {rank} on {host} waits for data {waiting_s / total_s:.0%} of the time")
    return lines
