"""Micro-batches with what the teachers saw in them, in order or one micro-batch ahead of the student.

Ahead on a GPU, copy and teachers run in a stream of their own: while the student of micro-batch i computes and waits
for other ranks, the teachers work on i + 1. That costs the memory of one more batch and its targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from mimscale.contracts import Batch, Targets
from mimscale.teachers.bank import Bank

Lesson = tuple[Batch, dict[str, Targets]]


@dataclass(frozen=True)
class _Submitted:
    """A micro-batch that the teachers are at. done: when they are through; None where nothing runs beside the host."""

    raw: Batch
    batch: Batch
    targets: dict[str, Targets]
    done: torch.cuda.Event | None


class Lessons(Iterator[Lesson]):
    """(normalised batch on the device, targets by teacher), the same ones whether `ahead` or not.

    prepare: the method's, called with each batch in host memory just before the student gets it; it leaves the images
    alone. waiting: put around the wait for the loader.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        bank: Bank,
        device: torch.device,
        *,
        ahead: bool,
        prepare: Callable[[Batch], Batch] = lambda batch: batch,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._batches, self._bank, self._device, self._ahead = batches, bank, device, ahead
        self._prepare, self._waiting = prepare, waiting
        self._submitted: _Submitted | None = None
        self._stream = torch.cuda.Stream(device) if ahead and device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # the teachers' weights are still on their way

    def __next__(self) -> Lesson:
        if not self._ahead:
            batch = self._prepare(self._fetch()).to(self._device).normalised()
            return batch, self._bank(batch.images)
        now = self._submitted or self._submit()
        try:
            self._submitted = self._submit()
        except StopIteration:
            self._submitted = None
        prepared = self._prepare(now.raw)
        batch = now.batch if prepared is now.raw else replace(prepared.to(self._device), images=now.batch.images)
        if now.done is not None:
            student = torch.cuda.current_stream(self._device)
            student.wait_event(now.done)
            for tensor in (*_tensors(now.batch), *(t for targets in now.targets.values() for t in _tensors(targets))):
                tensor.record_stream(student)  # its memory is not given away while the student reads it
        return batch, now.targets

    def _fetch(self) -> Batch:
        with self._waiting():
            return next(self._batches)

    def _submit(self) -> _Submitted:
        raw = self._fetch()
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            batch = raw.to(self._device).normalised()
            targets = self._bank(batch.images)
            done = None if self._stream is None else self._stream.record_event()
        return _Submitted(raw, batch, targets, done)


def _tensors(record: Batch | Targets) -> Iterator[Tensor]:
    """Every tensor in a dataclass of tensors and of mappings to tensors."""
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from (entry for entry in value.values() if isinstance(entry, Tensor))
