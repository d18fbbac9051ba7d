"""Micro-batches and the teachers' targets for them, computed in order or one micro-batch ahead of the student.

With `ahead` on a GPU, the teachers run in their own CUDA stream: while the student computes micro-batch i and waits for
other ranks, the teachers compute the targets of i + 1. That costs the memory of one more batch and its targets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mimscale.teachers.ensemble import TeacherEnsemble
from mimscale.types import Batch, PrefetchedBatch, Targets, keep_for


@dataclass(frozen=True)
class _Submitted:
    """A micro-batch whose targets are being computed. done: recorded after them; None without an own stream."""

    batch: Batch
    targets: dict[str, Targets]
    done: torch.cuda.Event | None


class TeacherPrefetcher:
    """Call `next_batch`, then `targets`, for each micro-batch. `ahead` changes neither batches nor targets.

    ahead: experimental; equal targets on a GPU were tested, its speed was not measured. prepare: `Method.prepare`,
    called with each batch in host memory just before it is returned; must not change the images.
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
            self._stream.wait_stream(
                torch.cuda.current_stream(device)
            )  # the copies of the teachers' weights to the device may not be finished

    def next_batch(self) -> Batch:
        """Wait for the loader; returns the next batch, in host memory. Raises StopIteration after the last."""
        while len(self._fetched) < self._depth:
            batch = next(self._batches, None)
            if batch is None:
                break
            self._fetched.append(batch)
        if not self._fetched:
            raise StopIteration
        return self._fetched[0].raw

    def targets(self) -> tuple[Batch, dict[str, Targets]]:
        """(the batch that `next_batch` returned, normalised on the device; teacher -> targets)."""
        for prefetched in list(self._fetched)[len(self._submitted) :]:
            self._submitted.append(self._submit(prefetched))
        raw, now = self._fetched.popleft().raw, self._submitted.popleft()
        prepared = self._prepare(raw)
        # only what `prepare` has added: the rest lies in memory of the loader, which may be filled again after this
        changes: dict[str, Any] = {}
        for name, value in vars(prepared).items():
            if value is not getattr(raw, name):
                changes[name] = value.to(self._device, non_blocking=True) if isinstance(value, Tensor) else value
        batch = replace(now.batch, **changes)
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
