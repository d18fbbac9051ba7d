"""Which operators a computation dispatches, and the shapes that they return."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Operators(TorchDispatchMode):
    """Counts operators by name, such as aten.clone.default, and collects the shapes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names[str(func)] += 1
        self.shapes |= {tuple(value.shape) for value in tree_leaves(result) if isinstance(value, Tensor)}
        return result


class Attentions(TorchFunctionMode):
    """Collects (batch, heads, queries, keys) of the calls of scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, int, int, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key = args[:2]
            self.calls.append((*query.shape[:3], key.shape[2]))
        return func(*args, **(kwargs or {}))


def attention_matrices(operators: Operators, attentions: Attentions) -> set[tuple[int, ...]]:
    """Shapes of as many numbers as one per sample, head, query and key, with queries and keys as last dimensions."""
    return {
        shape
        for shape in operators.shapes
        for batch, heads, queries, keys in attentions.calls
        if shape[-2:] == (queries, keys) and prod(shape) >= batch * heads * queries * keys
    }
