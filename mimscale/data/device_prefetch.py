"""Copies batches to the device: the copy of the next batch overlaps with the computation on the current one.

On a GPU a separate CUDA stream copies the pinned batch, as uint8 and in one piece, and normalises it, one batch ahead;
this costs the memory of one more batch. The batch in host memory is kept until its copy is whole, because it may lie in
a slot of the loader that a worker would fill again. On a CPU nothing is prefetched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch

from mimscale.data.augment import DeviceAugmentation
from mimscale.data.color_jitter import jitter_and_normalise
from mimscale.types import Batch, PrefetchedBatch


class DevicePrefetcher:
    """Iterates over `batches`. The device copies are normalised, after colour jitter if the recipe asks for it.

    augment: what else is done to the images on the device; None: nothing.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device, augment: DeviceAugmentation | None = None):
        self._batches, self._device, self._augment = batches, device, augment
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._queue: deque[PrefetchedBatch] = deque()
        self._copied: deque[PrefetchedBatch] = deque()  # not known to be whole yet
        self._depth = 0 if self._stream is None else 1  # batches copied before they are asked for

    def __iter__(self) -> Iterator[PrefetchedBatch]:
        return self

    def __next__(self) -> PrefetchedBatch:
        while len(self._queue) <= self._depth:
            prefetched = self._copy_next()
            if prefetched is None:
                break
            self._queue.append(prefetched)
        if not self._queue:
            raise StopIteration
        return self._queue.popleft()

    def _copy_next(self) -> PrefetchedBatch | None:
        with torch.cuda.stream(self._stream):  # None: the current stream
            raw = next(self._batches, None)
            if raw is None:
                return None
            copy = jitter_and_normalise(raw.to(self._device))
            if self._augment is not None:
                copy = self._augment(raw, copy)
            prefetched = PrefetchedBatch(raw, copy, None if self._stream is None else self._stream.record_event())
        while self._copied and (ready := self._copied[0].ready) is not None and ready.query():
            self._copied.popleft()
        if prefetched.ready is not None:
            self._copied.append(prefetched)
        return prefetched
