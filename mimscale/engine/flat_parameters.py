"""Few parameters for an engine to care for: those of each repeated block as one flat tensor per parameter group.

DeepSpeed runs hooks, copies and kernels for every parameter in every step, whatever its size, and a Vision Transformer
has twelve per block. `flatten` puts a block's parameters of one group end to end in one `nn.Parameter`; the block's
`forward` begins by splitting it and putting the views where the parameters were, and ends by taking them away. That is
below DeepSpeed's hooks, which gather the flat parameter at ZeRO-3, and inside activation checkpointing. The backward
pass of the split is one concatenation.

Names outside the engine stay the natural ones: a `Place` says where a natural parameter lies. Parameters outside of
repeated blocks stay as they are: they are few.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from mimscale.models.vit import Residual

_set = object.__setattr__  # that of nn.Module searches parameters, modules and buffers first
ALIGNED = 16
"""Views of this many elements or a multiple keep those after them aligned, which matrix products like."""


@dataclass(frozen=True, eq=False)
class Place:
    """A natural parameter: flat(holder)[start : start + numel]. holder: what the engine holds.

    unit: equal for the parameters of one block, which few holders hold.
    """

    name: str
    unit: str
    holder: nn.Parameter
    start: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def read(self) -> Tensor:
        """The value, where the holder is whole: a view in the natural shape."""
        if self.holder.shape == self.shape:
            return self.holder.detach()
        return self.holder.detach()[self.start : self.start + self.numel].view(self.shape)


@dataclass(frozen=True)
class _Slot:
    """Where the views of a flat parameter go: attribute of module, in this shape (None: as it is, one-dimensional)."""

    module: nn.Module
    attribute: str
    shape: tuple[int, ...] | None


def natural(method: nn.Module, groups: list[dict[str, Any]] | None = None) -> list[Place]:
    """The plain twin of `flatten`: every parameter in a place of its own."""
    return [Place(name, name, p, 0, tuple(p.shape)) for name, p in method.named_parameters()]


@torch.no_grad()
def flatten(method: nn.Module, groups: list[dict[str, Any]]) -> list[Place]:
    """Give each repeated block of a method flat parameters, one per parameter group, and say where each natural
    parameter went, in the order of `named_parameters`. In place.

    groups: of `mimscale.optim.param_groups.parameter_groups`; their "params" become what the method holds now.
    """
    group_of = {name: index for index, group in enumerate(groups) for name in group["names"]}
    places = {place.name: place for place in natural(method)}
    for prefix, block in list(method.named_modules()):
        if isinstance(block, Residual):
            places |= {place.name: place for place in _flatten_block(block, f"{prefix}.", group_of)}
    for group in groups:
        group["params"] = list(dict.fromkeys(places[name].holder for name in group["names"]))
    return list(places.values())


def _flatten_block(block: Residual, prefix: str, group_of: dict[str, int]) -> list[Place]:
    owners = {f"{prefix}{name}": parameter for name, parameter in block.named_parameters()}
    order = sorted(owners, key=lambda name: (group_of[name], owners[name].numel() % ALIGNED != 0))  # stable
    places, splits = [], []
    for number, (_, members) in enumerate(groupby(order, key=group_of.__getitem__)):
        names = list(members)
        flat = nn.Parameter(torch.cat([owners[name].reshape(-1) for name in names]))
        start, slots = 0, []
        for name in names:
            path, _, attribute = name.removeprefix(prefix).rpartition(".")
            shape, module = tuple(owners[name].shape), block.get_submodule(path)
            places.append(Place(name, prefix, flat, start, shape))
            start += owners[name].numel()
            del module._parameters[attribute]
            _set(module, attribute, None)
            slots.append(_Slot(module, attribute, shape if len(shape) > 1 else None))
        block.register_parameter(f"flat{number}", flat)
        splits.append((f"flat{number}", tuple(owners[name].numel() for name in names), tuple(slots)))
    if splits:
        kind: Any = type(block)
        block.__class__ = _flat_class(kind)
        block.__dict__["flat_splits"] = tuple(splits)
    return places


@cache
def _flat_class(kind: type[Residual]) -> type[Residual]:
    """A subclass of a block's class whose parameters are views during `forward`, and absent otherwise.

    Absent, because a view would keep what ZeRO-3 has gathered alive. All parameters being the block's own, none is
    searched for in its parts: ZeRO-3 lists them eight times per block and step.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name, sizes, slots in self.flat_splits:
            for slot, view in zip(slots, getattr(self, name).split(sizes), strict=True):
                _set(slot.module, slot.attribute, view if slot.shape is None else view.view(slot.shape))
        try:
            return kind.forward(self, *args, **kwargs)
        finally:  # recomputing in the backward pass leaves by an exception
            for _, _, slots in self.flat_splits:
                for slot in slots:
                    _set(slot.module, slot.attribute, None)

    def named_parameters(
        self: Any, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        return nn.Module.named_parameters(self, prefix, False, remove_duplicate)

    return type(f"Flat{kind.__name__}", (kind,), {"forward": forward, "named_parameters": named_parameters})
