"""Micro-batches with what the teachers saw in them, in order or one micro-batch ahead of the student.

Ahead, on a GPU, the teachers run in a stream of their own: while the student of micro-batch i computes and waits
for other ranks, the teachers work on i + 1. That costs the memory of one more batch and its targets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from mimscale.teachers.ensemble import TeacherEnsemble
from mimscale.types import Batch, PrefetchedBatch, Targets, keep_for


@dataclass(frozen=True)
class _Submitted:
    """A micro-batch that the teachers are at. done: when they are through; None where nothing runs beside the host."""

    batch: Batch
    targets: dict[str, Targets]
    done: torch.cuda.Event | None


class TeacherPrefetcher:
    """`next_batch`, then `teach`, for each micro-batch: the same batches and targets whether `ahead` or not.

    prepare: the method's, called with each batch in host memory just before the student gets it; it leaves the images
    alone.
    """

    def __init__(
        self,
        ensemble: TeacherEnsemble,
        device: torch.device,
        batches: Iterator[PrefetchedBatch],
        *,
        ahead: bool,
        prepare: Callable[[Batch], Batch] = lambda batch: batch,
    ) -> None:
        self._ensemble, self._device, self._batches, self._prepare = ensemble, device, batches, prepare
        self._depth = 2 if ahead else 1
        self._fetched: deque[PrefetchedBatch] = deque()
        self._submitted: deque[_Submitted] = deque()
        self._stream = torch.cuda.Stream(device) if ahead and device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # the teachers' weights are still on their way

    def next_batch(self) -> Batch:
        """Wait for the loader; the batch whose turn it is, in host memory. Raises StopIteration after the last."""
        while len(self._fetched) < self._depth:
            batch = next(self._batches, None)
            if batch is None:
                break
            self._fetched.append(batch)
        if not self._fetched:
            raise StopIteration
        return self._fetched[0].raw

    def targets(self) -> tuple[Batch, dict[str, Targets]]:
        """(the batch that `next_batch` gave, normalised on the device; targets by teacher)."""
        for prefetched in list(self._fetched)[len(self._submitted) :]:
            self._submitted.append(self._submit(prefetched))
        raw, now = self._fetched.popleft().raw, self._submitted.popleft()
        prepared = self._prepare(raw)
        batch = now.batch
        if prepared is not raw:
            batch = replace(replace(prepared, images=raw.images[:0]).to(self._device), images=batch.images)
        if now.done is not None:
            student = torch.cuda.current_stream(self._device)
            student.wait_event(now.done)
            keep_for(student, now.batch, *now.targets.values())
        return batch, now.targets

    def _submit(self, prefetched: PrefetchedBatch) -> _Submitted:
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            batch = prefetched.take()
            targets = self._ensemble(batch.images)
            return _Submitted(batch, targets, None if self._stream is None else self._stream.record_event())
