"""A teacher's forward pass as one CUDA graph: one launch instead of some hundred."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mimscale.types import Targets, TeacherNeeds

WARMUP = 3  # passes before the capture, in which kernels are compiled and chosen


class GraphedTeacher:
    """Replays the first call that it gets; another shape of images is computed by `teacher` itself.

    Targets are copies, because the student's backward pass reads them while the next ones are computed.
    """

    def __init__(self, teacher: Callable[[Tensor, TeacherNeeds], Targets]) -> None:
        self._teacher = teacher
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, pixels: Tensor, needs: TeacherNeeds) -> Targets:
        """As `Teacher.forward`; needs: the same in every call."""
        if self._graph is None:
            self._capture(pixels, needs)
        assert self._graph is not None
        if pixels.shape != self._pixels.shape:
            return self._teacher(pixels, needs)
        self._pixels.copy_(pixels)
        self._graph.replay()
        return copied(self._targets)

    def _capture(self, pixels: Tensor, needs: TeacherNeeds) -> None:
        self._pixels = pixels.clone()
        stream, current = torch.cuda.Stream(pixels.device), torch.cuda.current_stream(pixels.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                self._teacher(self._pixels, needs)
        current.wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # others may copy batches meanwhile
            self._targets = self._teacher(self._pixels, needs)


def copied(targets: Targets) -> Targets:
    """The same values in memory of their own."""
    return Targets(
        {level: tokens.clone() for level, tokens in targets.levels.items()},
        {level: token.clone() for level, token in targets.cls.items()},
        None if targets.cls_attention is None else targets.cls_attention.clone(),
    )
