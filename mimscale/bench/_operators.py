"""What a piece of work asks of the host: operators that are dispatched, values read from a device, hooks.

All are exact and the same on every machine, unlike times: what the host does in a step grows with them. Operators are
counted below autograd, where each is a kernel launch or a change of metadata. The backward pass is counted on a CPU
only: on a GPU it runs on other threads. A graph of torch.compile runs eager while it is counted.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")

READING_OPERATORS = frozenset(
    f"aten::{name}" for name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")
)
"""Operators whose result the host waits for: a value (`item`, `float`, `bool`), or a size that depends on values."""
READING_METHODS = frozenset({"tolist", "numpy", "__array__"})
"""Methods of a tensor that read it without an operator of their own."""


class OperatorCount(TorchDispatchMode):
    """As a context: counts what is dispatched inside it, by phase.

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

    @property
    def total(self) -> int:
        return self.names.total()

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
    def __init__(self, counter: OperatorCount) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in READING_METHODS:
            self.counter.read()
        return func(*args, **(kwargs or {}))


@contextmanager
def counting(phase: str = "step") -> Iterator[OperatorCount]:
    """A counter of everything that this thread dispatches inside."""
    with OperatorCount(phase) as counter, _Methods(counter):
        yield counter


def count_operators(work: Callable[[], T]) -> tuple[T, int]:
    """(what `work` returns, operators dispatched in it)."""
    with OperatorCount() as count:
        result = work()
    return result, count.total


def count_hooks(module: nn.Module) -> int:
    """Hooks that a forward and backward pass through a module calls in Python: of its modules and its parameters."""
    of_modules = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = sum(len(getattr(child, name)) for child in module.modules() for name in of_modules)
    of_parameters = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return modules + sum(len(getattr(p, name) or ()) for p in module.parameters() for name in of_parameters)


def count_step(forward: Callable[[], T], backward: Callable[[T], object], update: Callable[[], object]) -> list[int]:
    """Operators of the three parts of a training step. forward: gives what `backward` gets, for example the loss.

    Call it after two steps or more: first steps build things.
    """
    loss, ahead = count_operators(forward)
    return [ahead, count_operators(lambda: backward(loss))[1], count_operators(update)[1]]


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
