"""The global gradient norm, computed once per step, in which inf and NaN are found; the fast path `norm_check`.

DeepSpeed searches each gradient for them, joins the ranks' findings in a collective of their own, converts each
gradient to float64 for the norm and sums that over the ranks for each parameter group. Here a step has one norm over
all that the rank holds and one collective. An element that is not finite makes the norm inf or NaN on every rank.

The converse does not hold: the squares of float32 gradients overflow where a norm exceeds 1.8e19, and such a step is
skipped too, though each gradient is finite. In float16 that cannot happen: its largest number is 65,504.

Like `zero_layout` this file uses private names of DeepSpeed. A release without one of them is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CPU_CHUNK = 1 << 12
"""PyTorch's CPU kernel adds up float32 squares one after another, so long tensors are cut; its CUDA kernel does so."""


def local_norm(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm of all elements, 0-dim float64. Each tensor's own, or on a CPU a piece's, is computed in float32."""
    pieces: list[Tensor] = []
    for gradient in gradients:
        whole = gradient.numel() // CPU_CHUNK * CPU_CHUNK if gradient.device.type == "cpu" else 0
        flat = gradient.reshape(-1)
        if whole:
            rows = flat[:whole].view(-1, CPU_CHUNK)
            pieces.append(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32))
        if whole < flat.numel():
            pieces.append(flat[whole:])
    norms = torch._foreach_norm(pieces, 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms), dtype=torch.float64)


def global_norm(gradients: Sequence[Tensor], group: Any = None) -> Tensor:
    """L2 norm over the ranks of `group`, which hold different elements: 0-dim float32, inf if one is not finite."""
    square = local_norm(gradients).square()
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(square, group=group)
    return square.sqrt().float().nan_to_num(nan=torch.inf, posinf=torch.inf)


def use_in(zero: Any, stage: int) -> None:
    """Have DeepSpeed's optimiser of a stage take its norm from here and leave out its own search. Raises AttributeError
    for a release that has other names.
    """
    if stage == 3:
        zero.check_overflow, zero._get_norm_groups  # noqa: B018

        def norm_groups() -> list[Tensor]:
            return [_of(zero, [gradient for group in zero.averaged_gradients.values() for gradient in group])]

        zero._get_norm_groups = norm_groups
    else:
        zero.check_overflow, zero.scaled_global_norm  # noqa: B018

        def scaled_global_norm(norm_type: int = 2) -> Tensor:
            gradients: list[Tensor] = []
            for group in zero.averaged_gradients.values():
                flat = getattr(group, "flat_partition", None)  # DeepSpeed's buffer of a partition, in bf16
                gradients += group if flat is None else [flat]
            return _of(zero, gradients)

        zero.scaled_global_norm = scaled_global_norm
    zero.check_overflow = _no_search


def _of(zero: Any, gradients: Sequence[Tensor]) -> Tensor:
    return global_norm([gradient.detach() for gradient in gradients], zero.dp_process_group)


def _no_search(partition_gradients: bool = True) -> None:
    """In place of DeepSpeed's search in every gradient."""
