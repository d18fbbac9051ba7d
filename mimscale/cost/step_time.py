"""Time of one optimiser step: a GPU and its host beside each other, and the communication that nothing hides.

The GPU takes the time of its products at the rate that products of this kind reach, of everything else by its bytes,
and of the update. The host launches operators and runs DeepSpeed's hooks; the GPU cannot be ahead of it. So a phase
(teachers, forward, backward) ends when the GPU is done with it and the host has launched it; in the update, which reads
the norm, each waits for the other. `mimscale plan --fit` compares the model with every measured step of docs/plan.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from mimscale.cost.communication import collectives, seconds
from mimscale.cost.devices import Device, Interconnect
from mimscale.cost.flops import arithmetic_of
from mimscale.cost.memory import Zero
from mimscale.cost.trace import Shapes, Trace, Work, total
from mimscale.models.vit import Residual

UPDATE_BYTES = 34
"""Memory traffic of AdamW per parameter: reads and writes of master, two moments, gradient and weight."""
EAGER_QUANTISED = 2.1
"""A teacher in int8 or fp8 that is not compiled takes as many times the bf16 one's time (181 ms for 85, measured)."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step. gpu: of it products, elementwise (all other operators), update, and teachers
    (their part of both). host: what the host needs if the GPU took no time. communication: all of it; exposed: what
    nothing hides.
    total: of the step.
    """

    gpu: float
    products: float
    elementwise: float
    update: float
    teachers: float
    host: float
    communication: float
    exposed: float
    total: float

    @property
    def limit(self) -> str:
        """What decides the time."""
        floors = {"GPU": self.gpu, "host": self.host, "network": self.exposed}
        return max(floors, key=lambda name: floors[name])


@dataclass(frozen=True)
class Held:
    """Parameters as DeepSpeed holds them: elements of each, in forward order."""

    sizes: tuple[int, ...]
    blocks: int
    recompute_every: int


def held(shapes: Shapes, recompute_every: int) -> Held:
    """What DeepSpeed is handed: the parameters of the method, or one per Block and group (engine.plain)."""
    method, engine = shapes.method, shapes.config.engine
    blocks = [module for module in method.modules() if isinstance(module, Residual)]
    if engine.backend == "torch" or not engine.uses("flat_parameters"):
        return Held(tuple(p.numel() for p in method.parameters()), len(blocks), recompute_every)
    inside = {id(p) for block in blocks for p in block.parameters()}
    sizes = [p.numel() for p in method.parameters() if id(p) not in inside]
    for block in blocks:
        sizes.append(sum(p.numel() for p in block.parameters() if p.dim() > 1))
        sizes.append(sum(p.numel() for p in block.parameters() if p.dim() <= 1))
    return Held(tuple(size for size in sizes if size), len(blocks), recompute_every)


def step_time(
    shapes: Shapes,
    zero: Zero,
    trace: Trace,
    parameters: Held,
    *,
    gpu: Device,
    link: Interconnect,
    ranks: int,
    per_node: int,
    accumulation: int,
    uncropped_per_image: float = 0.0,
) -> StepTime:
    """Predict one optimiser step of `accumulation` micro-batches on each of `ranks` GPUs."""
    forward, backward = trace.phase("forward"), trace.phase("backward")
    teachers = [_teacher(shapes, name, work, gpu) for name, work in trace.teachers.items()]
    uncropped = trace.uncropped * (uncropped_per_image * trace.micro_batch)
    precision, host = arithmetic_of(shapes.config, zero.precision), gpu.host
    gpu_phases = (
        sum(products + other for products, other in teachers),
        _busy(forward, precision, gpu),
        _busy(backward, precision, gpu),
    )
    count = len(parameters.sizes)
    recomputed = parameters.blocks // parameters.recompute_every if parameters.recompute_every else 0
    stage3 = host.zero3_parameter_s * count if zero.stage == 3 else 0.0
    host_phases = (
        host.kernel_s * total(trace.teachers).kernels,
        host.kernel_s * forward.kernels + host.recompute_block_s * recomputed + stage3 / 3,
        host.kernel_s * backward.kernels + host.parameter_s * count + stage3 * 2 / 3,
    )
    size = float(sum(parameters.sizes))
    update = UPDATE_BYTES * size / (ranks if zero.stage else 1) / gpu.bandwidth
    found = collectives(zero, parameters.sizes, ranks, accumulation)
    clock, busy = 0.0, 0.0
    hiding = {"forward": 0.0, "backward": 0.0}
    for _ in range(accumulation):
        for phase, takes, launches in zip(("teachers", "forward", "backward"), gpu_phases, host_phases, strict=True):
            start = busy
            busy = max(clock + launches, max(clock, busy) + takes)
            clock += launches
            if phase in hiding:
                hiding[phase] += busy - start
    spent = {phase: sum(seconds(one, gpu, link, ranks, per_node) for one in found if one.phase == phase)
             for phase in ("forward", "backward", "update")}  # fmt: skip
    exposed = spent["update"]
    for phase, room in hiding.items():
        exposed += max(0.0, spent[phase] - room) if zero.overlap else spent[phase]
    after = host.step_s + host.update_parameter_s * count
    extra = _busy(uncropped, precision, gpu)
    products = sum(p for p, _ in teachers) + (forward.flops + backward.flops) / gpu.products(precision)
    elementwise = sum(o for _, o in teachers) + (forward.other_bytes + backward.other_bytes) / gpu.bandwidth
    return StepTime(
        gpu=accumulation * sum(gpu_phases) + update + accumulation * extra,
        products=accumulation * products,
        elementwise=accumulation * elementwise,
        update=update,
        teachers=accumulation * gpu_phases[0],
        host=accumulation * sum(host_phases) + after,
        communication=sum(spent.values()),
        exposed=exposed,
        total=max(busy, clock) + accumulation * extra + after + update + exposed,
    )


def _busy(work: Work, precision: str, gpu: Device) -> float:
    return work.flops / gpu.products(precision) + work.other_bytes / gpu.bandwidth


def _teacher(shapes: Shapes, name: str, work: Work, gpu: Device) -> tuple[float, float]:
    """Seconds of a teacher's (products, all else)."""
    config = shapes.config.teachers[name]
    fast = config.precision in ("int8", "fp8")
    slower = EAGER_QUANTISED if fast and not config.compile else 1.0
    precision = config.precision if fast and config.compile and config.precision in gpu.peak else config.storage
    rate = gpu.products(precision)
    return slower * work.flops / rate, slower * work.other_bytes / gpu.bandwidth
