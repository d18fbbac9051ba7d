"""Where a step's time goes: marks between its phases, as CUDA events on a GPU, by the clock on a CPU."""

from __future__ import annotations

import time
from typing import Any

import torch


class PhaseMarks:
    """Call `mark(phase)` as each phase begins, `end()` after the last; nothing waits for the device until `read`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str | None, float, Any]] = []

    def mark(self, phase: str | None) -> None:
        event = None
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self._marks.append((phase, time.perf_counter(), event))

    def end(self) -> None:
        self.mark(None)

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """Phase -> ms of the device, and phase -> ms of the host, summed since the last call. Waits for the device.

        On a GPU the host's is the time to hand over the work of the phase, or to wait where the phase waits.
        """
        if self._cuda:
            torch.cuda.synchronize()
        device_ms: dict[str, float] = {}
        host_ms: dict[str, float] = {}
        for (phase, at_s, event), (_, after_s, next_event) in zip(self._marks, self._marks[1:], strict=False):
            if phase is None:
                continue
            spent_ms = 1000 * (after_s - at_s)
            host_ms[phase] = host_ms.get(phase, 0.0) + spent_ms
            device_ms[phase] = device_ms.get(phase, 0.0) + (event.elapsed_time(next_event) if event else spent_ms)
        self._marks = []
        return device_ms, host_ms
