"""Counts what a training step asks of the host: operators through PyTorch's dispatcher, and values read from a device."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READING_OPERATORS = frozenset(
    f"aten::{name}" for name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")
)
"""Operators whose result the host waits for: a value (`item`, `float`, `bool`), or a size that depends on values."""
READING_METHODS = frozenset({"tolist", "numpy", "__array__"})
"""Methods of a tensor that read it without an operator of their own."""


class OperatorCounter(TorchDispatchMode):
    """Counts by phase while it is active. Works on a CPU; a graph of torch.compile runs eager under it.

    phase: what the counts go to; set it when the phase begins. operators: phase -> how many were dispatched.
    names: (phase, operator) -> how often. reads: place in the source -> how many values were read from there.
    A read of the optimiser's own step counter does not count: it is kept in host memory unless AdamW is fused.
    """

    def __init__(self, phase: str = "step") -> None:
        super().__init__()
        self.phase = phase
        self.names: Counter[tuple[str, str]] = Counter()
        self.reads: Counter[str] = Counter()

    @property
    def operators(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for (phase, _), count in self.names.items():
            found[phase] = found.get(phase, 0) + count
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        self.names[self.phase, name] += 1
        if name in READING_OPERATORS:
            self.read()
        return func(*args, **(kwargs or {}))

    def read(self) -> None:
        place = _place()
        if not place.startswith("torch/optim/"):
            self.reads[place] += 1


class _Methods(TorchFunctionMode):
    def __init__(self, counter: OperatorCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in READING_METHODS:
            self.counter.read()
        return func(*args, **(kwargs or {}))


@contextmanager
def counting(phase: str = "step") -> Iterator[OperatorCounter]:
    """A counter of everything that this thread dispatches inside."""
    with OperatorCounter(phase) as counter, _Methods(counter):
        yield counter


def _place() -> str:
    """File and line that asked for a value: the nearest frame that is not PyTorch's way to an operator."""
    frame = sys._getframe(2)
    skipped = (__file__, torch.__file__.removesuffix("__init__.py") + "_", torch.__file__[:-11] + "utils/_")
    while frame.f_back is not None and frame.f_code.co_filename.startswith(skipped):
        frame = frame.f_back
    file = frame.f_code.co_filename
    for folder in ("/site-packages/", "/mimscale/"):
        before, found, after = file.rpartition(folder)
        if found:
            return f"{after if folder == '/site-packages/' else 'mimscale/' + after}:{frame.f_lineno}"
    return f"{file}:{frame.f_lineno}"
