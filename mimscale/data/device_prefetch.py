"""Batches on their way to the device: the copy of the next one runs while this one is worked on.

On a GPU, a stream of its own takes the pinned batch over and normalises it, one batch ahead of its use: that costs the
memory of one more batch. On the CPU, batches pass through one by one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch

from mimscale.data.color_jitter import finished
from mimscale.types import Batch, PrefetchedBatch


class DevicePrefetcher:
    """Iterates over `batches`; the copies are jittered where asked, and normalised."""

    def __init__(self, batches: Iterator[Batch], device: torch.device):
        self._batches, self._device = batches, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._waiting: deque[PrefetchedBatch] = deque()
        self._ahead = 0 if self._stream is None else 1

    def __iter__(self) -> Iterator[PrefetchedBatch]:
        return self

    def __next__(self) -> PrefetchedBatch:
        while len(self._waiting) <= self._ahead:
            prefetched = self._stage()
            if prefetched is None:
                break
            self._waiting.append(prefetched)
        if not self._waiting:
            raise StopIteration
        return self._waiting.popleft()

    def _stage(self) -> PrefetchedBatch | None:
        with torch.cuda.stream(self._stream):  # None: where we are
            raw = next(self._batches, None)
            if raw is None:
                return None
            copy = finished(raw.to(self._device))
            return PrefetchedBatch(raw, copy, None if self._stream is None else self._stream.record_event())
