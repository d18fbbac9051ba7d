"""Memory of one GPU, by part, for each ZeRO stage: what is allocated at most, and at which moment of a step.

P parameters on N ranks, AdamW in float32, DeepSpeed 0.19.8. A step is at its peak either at the start of the backward
pass, when all activations are alive, or in the update, when gradients are copied to float32; with a frozen encoder,
which leaves no activations, in its forward pass. The formulas are those of counted allocations
(tests/cost/test_memory.py) and give the measured memory of docs/plan.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mimscale.config.deepspeed import precision_of
from mimscale.cost.trace import Shapes, Trace
from mimscale.optim.optimizers.base import optimizer_class

WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
REDUCE_BUCKET = 5e8
LIVE_PARAMETERS = 1e9
Moment = Literal["forward pass", "backward pass", "update", "teachers"]


@dataclass(frozen=True)
class Zero:
    """What a DeepSpeed JSON says about memory and communication. stage: 0 to 3; precision: of the parameters.

    sums: bytes per gradient that is kept until the update. buckets: bytes of the buffers in which gradients are
    reduced. bucket, gather: elements that one collective reduces and gathers at most. live: parameters that ZeRO-3
    keeps gathered at most. overlap: whether communication runs beside the backward pass. secondary: GPUs over which
    ZeRO-3 keeps a second copy of the parameters (hpZ), 1: none. to_owner: stages 1 and 2 reduce each gradient to the
    rank that keeps it, and not to all.
    """

    stage: int
    precision: Literal["fp32", "bf16", "fp16"]
    sums: int
    buckets: float
    bucket: float
    gather: float
    live: float
    overlap: bool
    secondary: int
    to_owner: bool = False

    @property
    def width(self) -> int:
        """Bytes per parameter."""
        return WIDTH[self.precision]

    @classmethod
    def of(cls, ds_config: Mapping[str, Any]) -> Zero:
        """Read a checked config (`load_ds_config`); what it leaves out has DeepSpeed's default."""
        values = ds_config.get("zero_optimization", {})
        stage, precision = int(values.get("stage", 0)), precision_of(ds_config)
        width = WIDTH[precision]
        sums = ds_config.get("data_types", {}).get("grad_accum_dtype", precision)
        overlap = bool(values.get("overlap_comm", stage == 3))
        bucket = float(values.get("reduce_bucket_size", REDUCE_BUCKET))
        buffers = 0 if stage == 0 else 2 if overlap and stage < 3 else 1
        gather = (
            values.get("stage3_prefetch_bucket_size", 5e7) if stage == 3 else values.get("allgather_bucket_size", 5e8)
        )
        return cls(
            stage,
            precision,
            4 if sums in ("fp32", "float32") else width,
            buffers * bucket * width,
            bucket,
            float(gather),
            float(values.get("stage3_max_live_parameters", LIVE_PARAMETERS)),
            overlap,
            int(values.get("zero_hpz_partition_size", 1)),
            stage in (1, 2) and not values.get("use_multi_rank_bucket_allreduce", True),
        )


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the moment when most is allocated, by part. moment: which one that is."""

    parts: Mapping[str, float]
    moment: Moment

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def teacher_bytes(shapes: Shapes, ranks: int) -> float:
    """Parameters of all teachers in their precision; those with `shard` over all ranks."""
    found = 0.0
    for name, teacher in shapes.teachers.items():
        config = shapes.config.teachers[name]
        width, count = WIDTH[config.storage], sum(p.numel() for p in teacher.parameters())
        linear = 0
        if config.precision in ("int8", "fp8"):
            linear = sum(p.numel() for block in teacher.blocks for p in block.parameters() if p.dim() == 2)
        found += (width * (count - linear) + linear) / (ranks if config.shard else 1)
    return found


def memory(
    shapes: Shapes,
    zero: Zero,
    trace: Trace,
    ranks: int,
    *,
    accumulation: int = 1,
    fused_update: bool = True,
    ahead: bool | None = None,
) -> Memory:
    """What one rank allocates at most. fused_update: whether the optimiser's step is one kernel without temporaries.

    accumulation: with more than one micro-batch per step, the sums of the first lie there while the second runs.
    ahead: whether teachers run one micro-batch ahead; None: as the recipe says.
    """
    config = shapes.config
    ahead = config.engine.teachers_ahead if ahead is None else ahead
    kept = float(sum(shapes.parameters.values()))
    states = len(optimizer_class(config.optim.name).STATES)
    split = ranks if zero.stage else 1
    whole = ranks if zero.stage == 3 else 1
    average = 4.0 * shapes.averaged(whole_groups=zero.stage > 0) / split
    always = {
        "parameters": zero.width * kept / whole,
        "frozen weights, buffers": float(zero.width * shapes.frozen),
        "optimiser": 4.0 * kept * states / split + (4.0 * kept / split if zero.stage or zero.width < 4 else 0.0),
        "moving average": average,
        "teachers": teacher_bytes(shapes, ranks),
        "images and targets": 2.0 * trace.inputs + (2 if ahead else 1) * trace.targets,
    }
    if zero.stage == 3:
        live = zero.width * min(kept, zero.live) if ranks > 1 else 0.0
        if zero.secondary > 1:
            live += zero.width * kept / zero.secondary
        always["gathered parameters"] = live
    one_rank = ranks == 1 and zero.stage in (1, 2) and config.engine.uses("one_rank")
    # a group's buffer comes with its first gradient: under layer decay with the layer's, else with the last layer's
    from_start = zero.stage == 3 or (one_rank and zero.stage == 2 and config.optim.layer_decay == 1) or accumulation > 1
    moments = {
        "forward pass": _forward(zero, trace, kept, ranks, zero.buckets, from_start),
        "backward pass": _backward(zero, trace, kept, ranks, zero.buckets, from_start),
        "update": _update(zero, kept, states, split, ranks, zero.buckets, fused_update, one_rank),
        "teachers": {"workspace": float(trace.teacher_peak)},
    }
    worst: Moment = max(moments, key=lambda moment: sum(moments[moment].values()))  # type: ignore[arg-type]
    return Memory({name: size for name, size in {**always, **moments[worst]}.items() if size}, worst)


def _forward(zero: Zero, trace: Trace, kept: float, ranks: int, bucket: float, from_start: bool) -> dict[str, float]:
    """What a forward pass needs beside what it leaves for the backward pass: all there is in a frozen encoder.

    from_start: whether a buffer for the partition of the gradients is there before the first one.
    """
    return {
        "activations": float(trace.activations),
        "gradients": _summed(zero, ranks) * kept if from_start else 0.0,
        "workspace": float(trace.forward_peak - trace.activations),
        "buckets": bucket if zero.stage == 3 else 0.0,
    }


def _summed(zero: Zero, ranks: int) -> float:
    """Bytes per parameter of the gradients that wait for the update."""
    return 4.0 if zero.stage == 0 else zero.sums / (ranks if zero.stage > 1 else 1)


def _backward(zero: Zero, trace: Trace, kept: float, ranks: int, bucket: float, from_start: bool) -> dict[str, float]:
    """The worst moment of the backward pass: activations leave while gradients come."""
    summed = _summed(zero, ranks)
    alive, gradients = max(
        ((float(peak), summed * (kept if from_start else done)) for peak, done in trace.backward), key=sum
    )
    activations = min(alive, float(trace.activations))
    return {"activations": activations, "gradients": gradients, "workspace": alive - activations, "buckets": bucket}


def _update(
    zero: Zero, kept: float, states: int, split: int, ranks: int, bucket: float, fused: bool, one_rank: bool
) -> dict[str, float]:
    """Gradients as they were summed, and their float32 copy, which sums in float32 beside 16-bit weights do without, on
    one rank all sums in float32; then what an optimiser that is not fused allocates.
    """
    temporaries = 0.0 if fused or states < 2 else 8.0 * kept / split
    if zero.stage == 0:
        return {"gradients": 4.0 * kept, "workspace": 4.0 * kept}
    summed = zero.sums * kept / (ranks if zero.stage > 1 else 1)
    in_place = zero.stage < 3 and zero.sums == 4 and (zero.width < 4 or one_rank)
    copy = 0.0 if in_place else 4.0 * kept / split
    stays = summed if in_place or zero.sums == zero.width or zero.stage == 3 else 0.0  # else freed before the step
    at_copy, at_step = summed + copy, stays + copy + temporaries
    return {
        "gradients": summed,
        "workspace": max(at_copy, at_step) - summed,
        "buckets": 0.0 if zero.stage < 3 else bucket,
    }
