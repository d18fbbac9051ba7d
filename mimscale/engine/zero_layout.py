"""Where DeepSpeed keeps each piece of each parameter: the map between live optimizer state and checkpoint fragments.

This file and `global_norm` are the ones that use DeepSpeed's private attributes. `Layout.check` tests the map at every
start without reference data: every master fragment, rounded, must equal the weights at its mapped place, and the
fragments of all ranks must tile every parameter. A release that renames or moves something is noticed there, not in a
loss curve.

A *holder* is a parameter as DeepSpeed knows it: a natural one, or a flat one that holds several
(`mimscale.engine.flat_parameters`). A *leaf* is the tensor that the base optimizer steps on; a piece of a leaf holds a
piece of a holder:

    stage 0     the leaf is the holder; replicated, so rank (index of the natural parameter mod world) writes it
    stage 1, 2  one leaf per group: the group's holders concatenated, padded, and cut into equal pieces
    stage 3     one leaf per sub-group: this rank's equal slice of each holder, padded per holder

A *fragment* is where such a piece and a natural parameter meet: leaf[offset : offset + length] holds
flat(parameter)[start : start + length]. Checkpoints know fragments only.

The optimiser's state and the student's moving average are kept per leaf, in the leaf's shape, so the same offsets hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mimscale.engine.flat_parameters import Place
from mimscale.optim.ema import STUDENT, MovingAverage
from mimscale.optim.optimizers.base import Optimizer, Piece

SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
COUNTERS = ("global_steps", "skipped_steps", "global_samples")
_ENGINE = (*COUNTERS, "micro_steps", "get_global_grad_norm")
_USED: dict[int, tuple[str, ...]] = {  # besides what `_map` reads
    0: (),
    1: ("clip_grad", "loss_scaler", "update_lp_params"),
    2: ("clip_grad", "loss_scaler", "update_lp_params"),
    3: ("clip_grad", "loss_scaler", "checkpoint_event_prologue", "checkpoint_event_epilogue"),
}


class LayoutError(RuntimeError):
    """The installed DeepSpeed keeps its state elsewhere than this file expects."""


@dataclass(frozen=True, eq=False)
class Fragment:
    """name, start, length: of the natural parameter. weights: where it begins in this rank's copy of the holder."""

    name: str
    holder: nn.Parameter
    start: int
    length: int
    leaf: Tensor
    offset: int
    weights: int
    owned: bool  # this rank writes it


@dataclass(frozen=True, eq=False)
class _Piece:
    """leaf[offset : offset + length] holds flat(holder)[start : start + length]."""

    holder: nn.Parameter
    start: int
    length: int
    leaf: Tensor
    offset: int


def _numel(parameter: Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


class Layout:
    """The fragments of this rank. Built right after `deepspeed.initialize`; creates the optimiser's state, empty.

    places: of all natural parameters, in the order in which they are shown. ema_decay: of the moving average, which is
    kept beside the leaves that hold a piece of it; None: there is none. averaged: how the names in it begin.
    """

    def __init__(
        self,
        ds_engine: Any,
        optimizer: type[Optimizer],
        places: Sequence[Place],
        ema_decay: float | None = None,
        averaged: tuple[str, ...] = (STUDENT,),
    ) -> None:
        self._ds, self._optimizer, self._averaged = ds_engine, optimizer, averaged
        self.stage: int = ds_engine.zero_optimization_stage()
        self.places = tuple(places)
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        try:
            zero = ds_engine.optimizer
            self._base = zero.optimizer if self.stage else zero
            scaler = getattr(zero, "loss_scaler", None)
            fields = SCALER_FIELDS if getattr(scaler, "dynamic", False) else ()
            for owner, names in ((ds_engine, _ENGINE), (zero, _USED[self.stage]), (scaler, fields)):
                for name in names:
                    getattr(owner, name)
            self._leaves, pieces = self._map(zero)
        except AttributeError as error:
            raise LayoutError(f"this DeepSpeed release keeps its state elsewhere ({error}); use 0.19.8") from error
        self.fragments = list(self._fragments(pieces))
        self.create_state(0)
        self._optimizer.use_pieces(self._base, list(self._pieces()), [p.name for p in self.places], self._total)
        self.check()
        leaves = dict.fromkeys(f.leaf for f in self.fragments if f.name.startswith(averaged))
        self.average = None if ema_decay is None else MovingAverage(ema_decay, leaves)

    def _map(self, zero: Any) -> tuple[list[Tensor], list[_Piece]]:
        pieces = []
        holders = list(dict.fromkeys(place.holder for place in self.places))
        if self.stage == 3:
            leaves = list(zero.fp32_partitioned_groups_flat)
            for leaf, group in zip(leaves, zero.fp16_groups, strict=True):
                offset = 0
                for holder in group:
                    slice_size = holder.partition_numel()
                    start = self._rank * slice_size
                    length = max(0, min(slice_size, _numel(holder) - start))
                    if length:
                        pieces.append(_Piece(holder, start, length, leaf, offset))
                    offset += slice_size
        elif self.stage:
            leaves = [group["params"][0] for group in zero.param_groups]
            for holder in holders:
                mapping = holder._hp_mapping  # type: ignore[attr-defined]
                if mapping is not None:  # else no piece of it lies on this rank
                    weights, masters = mapping.lp_fragment_address, mapping.hp_fragment_address
                    leaf = leaves[mapping.param_group_index]
                    pieces.append(_Piece(holder, weights.start, weights.numel, leaf, masters.start))
        else:
            leaves = [holder for group in zero.param_groups for holder in group["params"]]
            pieces = [_Piece(holder, 0, holder.numel(), holder, 0) for holder in holders]
        return leaves, pieces

    def _fragments(self, pieces: Sequence[_Piece]) -> Iterator[Fragment]:
        """Where the pieces and the natural parameters meet."""
        held: dict[nn.Parameter, list[tuple[int, Place]]] = {}
        for index, place in enumerate(self.places):
            held.setdefault(place.holder, []).append((index, place))
        for piece in pieces:
            for index, place in held[piece.holder]:
                first = max(piece.start, place.start)
                length = min(piece.start + piece.length, place.start + place.numel) - first
                if length > 0:
                    skipped = first - piece.start
                    yield Fragment(
                        place.name,
                        piece.holder,
                        first - place.start,
                        length,
                        piece.leaf,
                        piece.offset + skipped,
                        skipped if self.stage == 3 else first,  # ZeRO-3's copy is the piece, else the whole holder
                        self.stage > 0 or index % self._world == self._rank,
                    )

    def _pieces(self) -> Iterator[Piece]:
        """The fragments, as the optimiser is told of them."""
        dimensions = {place.name: len(place.shape) for place in self.places}
        for f in self.fragments:
            yield Piece(f.leaf, f.offset, f.length, f.name, dimensions[f.name])

    def _total(self, tensor: Tensor) -> Tensor:
        """Summed over the ranks, where a parameter is cut into pieces; on the device that the ranks talk through."""
        if not self.stage or self._world == 1:
            return tensor
        shared = tensor.to(self._ds.device)
        dist.all_reduce(shared)
        return shared.to(tensor.device)

    def kinds(self, fragment: Fragment) -> tuple[str, ...]:
        """What a checkpoint keeps of a fragment."""
        averaged = self.average is not None and fragment.name.startswith(self._averaged)
        return ("fp32", *self._optimizer.STATES, *(("ema",) if averaged else ()))

    def view(self, fragment: Fragment, kind: str) -> Tensor:
        """The live numbers of a fragment, 1-D: read on save, written on load."""
        if kind == "fp32":
            tensor = fragment.leaf.data
        elif kind == "ema":
            assert self.average is not None
            tensor = self.average.of(fragment.leaf)
        else:
            tensor = self._base.state[fragment.leaf][kind]
        return tensor.view(-1)[fragment.offset : fragment.offset + fragment.length]

    def _weights(self, fragment: Fragment) -> Tensor:
        """The same elements in the copy that the forward pass uses."""
        copy: Tensor = fragment.holder.ds_tensor if self.stage == 3 else fragment.holder  # type: ignore[attr-defined]
        return copy.data.view(-1)[fragment.weights : fragment.weights + fragment.length]

    def create_state(self, step: float) -> None:
        """The optimiser's state of every leaf, zero but for the step counter: what a first step would create.

        Done at once because DeepSpeed links states to parameters after the first GROUP's step, when other groups have
        none.
        """
        self._optimizer.create_state(self._base, self._leaves, step)

    def optimizer_step(self) -> int:
        """How many steps the optimiser has taken. Raises LayoutError where its own counters differ."""
        if not self._optimizer.COUNTS_STEPS:
            return int(self._ds.global_steps - self._ds.skipped_steps)
        steps = {int(self._base.state[leaf]["step"]) for leaf in self._leaves}
        if len(steps) > 1:
            raise LayoutError(f"the optimiser's step differs between groups: {sorted(steps)}")
        return steps.pop() if steps else 0

    def refresh_weights(self) -> None:
        """After the masters were written: bring the forward pass's copies up to date."""
        zero = self._ds.optimizer
        if self.stage == 3:
            zero.checkpoint_event_prologue()  # releases the gathered copies of small parameters
            for fragment in self.fragments:
                self._weights(fragment).copy_(self.view(fragment, "fp32"))
            zero.checkpoint_event_epilogue()
        elif self.stage:
            zero.update_lp_params()

    def mismatches(self) -> list[str]:
        """Names of local fragments whose rounded master differs from the weights."""
        return [
            f.name for f in self.fragments if not torch.equal(self.view(f, "fp32").to(f.holder.dtype), self._weights(f))
        ]

    def check(self) -> None:
        """Raise LayoutError on every rank if the map is wrong on any. Collective."""
        pieces = [(f.name, f.start, f.length) for f in self.fragments if f.owned]
        everyone: list[Any] = [None] * self._world
        dist.all_gather_object(everyone, (pieces, self.mismatches()))
        wrong = sorted({name for _, names in everyone for name in names})
        if wrong:
            raise LayoutError(f"masters and weights disagree for {len(wrong)} parameters, first {wrong[:3]}")
        filled: dict[str, int] = {}
        for name, start, length in sorted(piece for theirs, _ in everyone for piece in theirs):
            if filled.get(name, 0) != start:
                raise LayoutError(f"{name}: hole or overlap at element {start}")
            filled[name] = start + length
        for place in self.places:
            if filled.get(place.name) != place.numel:
                raise LayoutError(f"{place.name}: {filled.get(place.name, 0)} of {place.numel} elements are mapped")

    def shapes(self) -> dict[str, list[int]]:
        return {place.name: list(place.shape) for place in self.places}

    # -------------------------------------------------------------------------------- the engine's own small state

    def engine_state(self) -> dict[str, Any]:
        """Counters and loss scaler, JSON-able."""
        scaler = getattr(self._ds.optimizer, "loss_scaler", None)
        dynamic = getattr(scaler, "dynamic", False)
        return {
            "optimizer_step": self.optimizer_step(),
            "counters": {name: int(getattr(self._ds, name)) for name in COUNTERS},
            "scaler": {name: getattr(scaler, name) for name in SCALER_FIELDS} if dynamic else None,
        }

    def load_engine_state(self, state: dict[str, Any]) -> None:
        """The scaler is taken only where both runs have a dynamic one. The optimiser's step: by `create_state`."""
        for name in COUNTERS:
            setattr(self._ds, name, state["counters"][name])
        self._ds.micro_steps = self._ds.global_steps * self._ds.gradient_accumulation_steps()
        scaler = getattr(self._ds.optimizer, "loss_scaler", None)
        if state["scaler"] and getattr(scaler, "dynamic", False):
            for name in SCALER_FIELDS:
                setattr(scaler, name, state["scaler"][name])


def keep_weights_in_place(zero: Any) -> None:
    """ZeRO-1 and 2: leave out that each parameter is pointed at its place in DeepSpeed's buffer again after each step.

    It has pointed there since `deepspeed.initialize`. Raises LayoutError where it does not, AttributeError for a
    release that has other names.
    """
    for flat, group in zip(zero.bit16_groups_flat, zero.bit16_groups, strict=True):
        storage = flat.untyped_storage().data_ptr()
        if any(parameter.untyped_storage().data_ptr() != storage for parameter in group):
            raise LayoutError("DeepSpeed's parameters are no views of its buffer; use 0.19.8")
    zero._update_model_bit16_weights  # noqa: B018
    zero._update_model_bit16_weights = _nothing


def _nothing(group_index: int) -> None:
    """In place of DeepSpeed's loop over the parameters of a group."""
