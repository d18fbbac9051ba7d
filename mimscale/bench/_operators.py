"""How many operators a piece of work sends through PyTorch's dispatcher, and how many hooks a module calls.

Both are exact and the same on every machine, unlike times: what the host does in a step grows with them. Operators are
counted below autograd, where each is a kernel launch or a change of metadata; compiled code counts as what it still
calls. The backward pass is counted on a CPU only: on a GPU it runs on other threads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")


class OperatorCount(TorchDispatchMode):
    """As a context: counts the operators inside it. found: operator -> how often."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operator: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.found[str(operator)] += 1
        return operator(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.found.values())


def count_operators(work: Callable[[], T]) -> tuple[T, int]:
    """(what `work` returns, operators dispatched in it)."""
    with OperatorCount() as count:
        result = work()
    return result, count.total


def count_step(forward: Callable[[], T], backward: Callable[[T], object], update: Callable[[], object]) -> list[int]:
    """Operators of the three parts of a training step. forward: gives what `backward` gets, for example the loss.

    Call it after two steps or more: first steps build things.
    """
    loss, ahead = count_operators(forward)
    return [ahead, count_operators(lambda: backward(loss))[1], count_operators(update)[1]]


def count_hooks(module: nn.Module) -> int:
    """Hooks that a forward and backward pass through a module calls in Python: of its modules and its parameters."""
    of_modules = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = sum(len(getattr(child, name)) for child in module.modules() for name in of_modules)
    of_parameters = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return modules + sum(len(getattr(p, name) or ()) for p in module.parameters() for name in of_parameters)
