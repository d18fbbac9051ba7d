"""ZeRO-1 and 2 on one rank: gradients go straight to where the optimiser reads them; the fast path `one_rank`.

On one rank there is nothing to reduce and nothing to part. DeepSpeed still divides each gradient by one, copies it into
a bucket, reduces that, copies it into this rank's partition and, in fp32, puts the partition's gradients end to end
once more. Here each gradient is copied, from the second micro-batch of a step on added, to its place in one flat tensor
per parameter group. Gradients are equal to the bit; so are weights where none is clipped: the norm in fp32 is summed in
other pieces.

Like `zero_layout` this file uses private names of DeepSpeed. A release without one of them is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Gradients(list[Tensor]):
    """The gradients of a group in the order of its parameters, views of `flat_partition`: what DeepSpeed's `step` takes
    for one of its own, already flat.
    """

    def __init__(self, views: list[Tensor], flat_partition: Tensor) -> None:
        super().__init__(views)
        self.flat_partition = flat_partition


class _Partition:
    """The gradients of one parameter group: a new tensor in each step, as DeepSpeed has it."""

    def __init__(self, zero: Any, group: int) -> None:
        self._places: dict[Any, tuple[int, int]] = {}
        for parameter in zero.params_in_partition[group]:
            number = zero.get_param_id(parameter)
            self._places[parameter] = (zero.grad_partition_insertion_offset[group][0][number], parameter.numel())
        self._size, self._dtype = int(zero.partition_size[group]), zero.gradient_accumulation_dtype
        self._device = zero.single_partition_of_fp32_groups[group].device
        self._written: set[Any] = set()

    def begin(self) -> _Gradients:
        """For a step's first gradient."""
        flat = torch.empty(self._size, dtype=self._dtype, device=self._device)
        self._written.clear()
        views = [flat.narrow(0, start, numel).view(p.shape) for p, (start, numel) in self._places.items()]
        padding = self._size - sum(numel for _, numel in self._places.values())
        rest = [flat.narrow(0, self._size - padding, padding).zero_()] if padding else []
        return _Gradients([*views, *rest], flat)

    def take(self, parameter: Any, gradient: Tensor, gradients: _Gradients) -> None:
        start, numel = self._places[parameter]
        place = gradients.flat_partition.narrow(0, start, numel)
        if parameter in self._written:
            place.add_(gradient.view(-1))
        else:
            place.copy_(gradient.view(-1))
            self._written.add(parameter)

    def end(self, gradients: _Gradients) -> None:
        """After a step's last gradient: those that never came are zero."""
        for parameter, (start, numel) in self._places.items():
            if parameter not in self._written:
                gradients.flat_partition.narrow(0, start, numel).zero_()


@torch.no_grad()
def use_in(zero: Any) -> None:
    """Raises AttributeError for a release that has other names."""
    for name in ("reduce_ipg_grads", "_use_compact_grad_partition_buffer", "_fill_param_grad_accum_attribute"):
        getattr(zero, name)
    groups = {group: _Partition(zero, group) for group in range(len(zero.bit16_groups))}
    zero.reduce_independent_p_g_buckets_and_remove_grads  # noqa: B018

    def begin(group: int) -> _Gradients:
        if zero.averaged_gradients.get(group) is None:
            zero.averaged_gradients[group] = groups[group].begin()
        gradients: _Gradients = zero.averaged_gradients[group]
        return gradients

    def take(parameter: Any, group: int) -> None:
        gradient = getattr(parameter, "grad_accum", None)
        gradient = parameter.grad if gradient is None else gradient
        groups[group].take(parameter, gradient, begin(group))
        parameter.grad = parameter.grad_accum = None

    def after_backward(comm_dtype: Any = None) -> None:
        if zero.is_gradient_accumulation_boundary():
            for group, partition in groups.items():
                partition.end(begin(group))

    zero.reduce_independent_p_g_buckets_and_remove_grads = take
    zero.reduce_ipg_grads = after_backward
    zero._use_compact_grad_partition_buffer = lambda group: True
    if zero.partition_gradients:  # ZeRO-2 hands over each micro-batch; no fp32 copy of its gradients in between
        zero._fill_param_grad_accum_attribute = lambda parameter: None
