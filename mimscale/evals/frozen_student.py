"""A copy of the student as it is at one step, apart from the module that an engine trains.

The engine's module is not used for an evaluation: it may hold flat parameters, compiled blocks, recorded CUDA graphs,
or hooks that gather parameters, and a run that is evaluated must compute what one that is not does, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

STUDENT = "student."


class StudentSkeleton:
    """The structure of a method's student without its numbers, taken before an engine gets the method."""

    def __init__(self, student: nn.Module) -> None:
        memo: dict[int, Any] = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in student.parameters()
        }
        memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in student.buffers()}
        self._module = copy.deepcopy(student, memo).eval()

    def filled(self, tensors: Iterable[tuple[str, Tensor]]) -> Any:
        """A student in evaluation mode that holds these parameters and buffers. Raises KeyError if one is missing."""
        student = copy.deepcopy(self._module)
        for name, tensor in tensors:
            path, _, attribute = name.rpartition(".")
            module = student.get_submodule(path)
            if attribute in module._parameters:
                module._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
            else:
                module._buffers[attribute] = tensor
        every = [*student.named_parameters(), *student.named_buffers()]
        missing = [name for name, tensor in every if tensor.is_meta]
        if missing:
            raise KeyError(f"the student's {missing[0]} was not given")
        return student


def copied(
    tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, prefix: str = STUDENT
) -> list[tuple[str, Tensor]]:
    """Copies of parameters, whose names lose the prefix. Takes all of `tensors` even if a copy fails (out of
    memory), because other ranks take them too; raises afterwards.
    """
    taken: list[tuple[str, Tensor]] = []
    failure: Exception | None = None
    for name, tensor in tensors:
        if failure is None:
            try:
                taken.append((name.removeprefix(prefix), tensor.detach().to(dtype, copy=True)))
            except Exception as error:
                failure = error
                taken.clear()
    if failure is not None:
        raise failure
    return taken
