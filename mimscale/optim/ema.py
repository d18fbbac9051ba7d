"""An exponential moving average of weights, kept in float32 beside the tensors that an optimiser steps on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

STUDENT = "student."
"""Parameters whose names begin so are averaged, unless a method says otherwise: what is kept after pre-training."""


class MovingAverage:
    """average = decay x average + (1 - decay) x weights, once per step.

    weights: float32 tensors of any shape, the same objects for the whole run; the averages begin at their values.
    """

    @torch.no_grad()
    def __init__(self, decay: float, weights: Iterable[Tensor]) -> None:
        self._decay = decay
        self._weights = list(weights)
        self._averages = [tensor.detach().clone() for tensor in self._weights]
        self._of = dict(zip(self._weights, self._averages, strict=True))

    def of(self, weights: Tensor) -> Tensor:
        """The average of one of the tensors, in the same shape: read on save, written on load."""
        return self._of[weights]

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew at the present weights."""
        for average, weights in zip(self._averages, self._weights, strict=True):
            average.copy_(weights)

    @torch.no_grad()
    def update(self) -> None:
        """After a step that changed the weights."""
        if self._averages:  # a rank may hold no piece of the student
            torch._foreach_mul_(self._averages, self._decay)
            torch._foreach_add_(self._averages, self._weights, alpha=1 - self._decay)
