"""The student's blocks as CUDA graphs: a segment of blocks is one launch forward and one backward.

PyTorch's `make_graphed_callables` captures them. Weights are read where they lie and gradients leave each segment as
they do eagerly, so the hooks that hand gradients to DeepSpeed stay outside. What a graph reads and writes keeps its
place in memory for the whole run: its inputs, its activations, and the gradients of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mimscale.engine.compile import SEGMENT
from mimscale.engine.config import EngineConfig
from mimscale.errors import UserError
from mimscale.models.vit import Residual, Segment, SegmentRunner, run_segment

Asked = Literal["off", "auto", "on"]
Key = tuple[Any, ...]


def fault(config: EngineConfig, device: torch.device, stage: int, accumulation: int) -> str:
    """Why the student cannot run as CUDA graphs; empty if it can."""
    if device.type != "cuda":
        return "CUDA graphs need a CUDA device"
    if config.backend == "torch":
        return "autocast and DistributedDataParallel cannot be captured by parts; use engine.backend = deepspeed"
    if stage == 3:
        return "ZeRO-3 gathers the weights to another address in each step"
    if config.activation_checkpointing:
        return "recomputation is not captured; set engine.activation_checkpointing = 0"
    if config.compile == "whole":
        return "engine.compile = whole leaves no segments; set it to blocks"
    if stage < 2 and accumulation > 1:
        return (
            "below ZeRO-2 gradients are accumulated in place, in the memory that the next micro-batch's graph writes; "
            "use a ZeRO-2 file or a larger engine.max_micro_batch"
        )
    return ""


def choose(asked: Asked, why_not: str) -> tuple[bool, str]:
    """(whether to capture the student, why). why_not: by `fault`."""
    if asked == "off" or why_not:
        return False, why_not if asked != "off" else "engine.cuda_graphs = off"
    return True, f"engine.cuda_graphs = {asked}"


def check(config: EngineConfig, device: torch.device, stage: int, accumulation: int) -> None:
    """Refuse `on` where it cannot be. Raises UserError."""
    why_not = fault(config, device, stage, accumulation)
    if config.cuda_graphs == "on" and why_not:
        raise UserError(f"engine.cuda_graphs = on: {why_not}; or set engine.cuda_graphs = auto")


@dataclass(frozen=True)
class SegmentCall:
    """One call of `run_segment`, as a captured graph must repeat it.

    tensors: copies of its tensor arguments. constants, names: see `separated`.
    """

    blocks: tuple[nn.Module, ...]
    tensors: tuple[Tensor, ...]
    constants: tuple[Any, ...]
    names: tuple[str, ...]
    keep: tuple[bool, ...]


class SegmentModule(nn.Module):
    """Blocks as a module of tensors: (x, then what else is a tensor) -> (x, outputs that are kept).

    run: computes them, see `run_segment`. The blocks are this module's only by its list of parameters.
    """

    def __init__(self, call: SegmentCall, run: Callable[[Segment], tuple[Tensor, list[Tensor]]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(call.blocks)
        self._call, self._run = call, run

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        call = self._call
        x, scales, *rest = joined(call.constants, tensors)
        extra, last = rest[: len(rest) - len(call.names)], rest[len(rest) - len(call.names) :]
        recompute = (False,) * len(call.keep)
        named = dict(zip(call.names, last, strict=True))
        out, kept = self._run(Segment(tuple(self.blocks), x, scales, tuple(extra), recompute, call.keep, named))
        return (out, *kept)


def separated(segment: Segment) -> tuple[tuple[Any, ...], list[Tensor]]:
    """(what the blocks of a segment get: None for a tensor, (value,) for what is none; the tensors)."""
    values = (segment.x_BTD, segment.scales_BN2, *segment.extra, *segment.last.values())
    constants = tuple(None if isinstance(value, Tensor) else (value,) for value in values)
    return constants, [value for value in values if isinstance(value, Tensor)]


def joined(constants: tuple[Any, ...], tensors: tuple[Tensor, ...]) -> list[Any]:
    """The inverse of `separated`."""
    remaining = iter(tensors)
    return [next(remaining) if constant is None else constant[0] for constant in constants]


class StudentGraphs:
    """Captures the segments in the first micro-batch and replays them from then on, where shapes are those of then.

    Passes without gradients and of other shapes are computed as before. notes: gets a line for each choice. capture: as
    `make_graphed_callables`.
    """

    def __init__(
        self,
        method: nn.Module,
        config: EngineConfig,
        device: torch.device,
        stage: int,
        accumulation: int,
        notes: list[str],
        capture: Callable[..., Any] = torch.cuda.make_graphed_callables,
    ) -> None:
        self._wanted, why = choose(config.cuda_graphs, fault(config, device, stage, accumulation))
        notes.append(f"cuda_graphs: {'on' if self._wanted else 'off'} for the student ({why})")
        self._method, self._notes, self._capture = method, notes, capture
        self._graphs: dict[Key, Callable[..., tuple[Tensor, ...]]] = {}

    def before_forward(self, compute_loss: Callable[[], Tensor]) -> None:
        """Called before each forward pass with that pass, when it is decided whether blocks are compiled."""
        if not self._wanted:
            return
        self._wanted = False
        blocks: list[Any] = [module for module in self._method.modules() if isinstance(module, Residual)]
        inner: SegmentRunner = getattr(blocks[0], "runner", SegmentRunner(SEGMENT, run_segment))
        calls = record(blocks, inner, compute_loss)
        keys = [key_of(call.blocks, call.keep, call.constants, call.names, call.tensors) for call in calls]
        if len(set(keys)) < len(keys):
            self._notes.append("cuda_graphs: off for the student (a block runs more than once in a forward pass)")
            return
        segments = tuple(SegmentModule(call, inner.run) for call in calls)
        graphed = self._capture(segments, tuple(call.tensors for call in calls))
        self._graphs = dict(zip(keys, graphed, strict=True))
        for block in blocks:
            block.runner = SegmentRunner(inner.length, self._replayed(inner))

    def _replayed(self, inner: SegmentRunner) -> Callable[[Segment], tuple[Tensor, list[Tensor]]]:
        def run(segment: Segment) -> tuple[Tensor, list[Tensor]]:
            constants, tensors = separated(segment)
            graph = None
            if torch.is_grad_enabled():
                graph = self._graphs.get(key_of(segment.blocks, segment.keep, constants, tuple(segment.last), tensors))
            if graph is None:
                return inner.run(segment)
            out, *kept = graph(*tensors)
            return out, kept

        return run


def record(blocks: list[Any], inner: SegmentRunner, compute_loss: Callable[[], Tensor]) -> list[SegmentCall]:
    """The segments that a forward pass runs, in their order."""
    calls: list[SegmentCall] = []

    def run(segment: Segment) -> tuple[Tensor, list[Tensor]]:
        constants, tensors = separated(segment)
        copies = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in tensors)
        calls.append(SegmentCall(segment.blocks, copies, constants, tuple(segment.last), segment.keep))
        return inner.run(segment)

    before = [getattr(block, "runner", None) for block in blocks]
    for block in blocks:
        block.runner = SegmentRunner(inner.length, run)
    try:
        compute_loss()
    finally:
        for block, runner in zip(blocks, before, strict=True):
            if runner is None:
                del block.runner
            else:
                block.runner = runner
    return calls


def key_of(
    blocks: tuple[nn.Module, ...],
    keep: tuple[bool, ...],
    constants: tuple[Any, ...],
    names: tuple[str, ...],
    tensors: Sequence[Tensor],
) -> Key:
    """What must be equal for a captured segment to be replayed."""
    return (id(blocks[0]), keep, constants, names, *((t.shape, t.dtype, t.requires_grad) for t in tensors))
