"""torch.autocast for the meta device, which has none: what it does to the operators that networks here are made of."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

IN_16_BIT = {F.linear, F.conv2d, F.scaled_dot_product_attention, torch.matmul, Tensor.matmul, Tensor.__matmul__}
"""Products, which autocast computes in bfloat16. Norms and sums keep the type of their input: float32 stays so."""


class MetaAutocast(TorchFunctionMode):
    """Casts the float32 inputs of products to bfloat16, each time anew, as for weights that need no gradient."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in IN_16_BIT:
            args, kwargs = tree_map(_in_16_bit, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _in_16_bit(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) and value.dtype == torch.float32 else value
