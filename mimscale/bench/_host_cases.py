"""Engines around a narrow method, measured in turns: PyTorch by hand, PyTorch's engine, DeepSpeed at each stage."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mimscale.bench import _operators, _synthetic
from mimscale.bench._operators import OperatorCount
from mimscale.config.deepspeed import load_ds_config, precision_of
from mimscale.config.run import RunConfig
from mimscale.distributed.world import World
from mimscale.engine.base import method_groups
from mimscale.optim.optimizers.base import optimizer_class
from mimscale.teachers.ensemble import TeacherEnsemble, build_skeletons, describe
from mimscale.training import setup
from mimscale.types import Batch, Targets

PHASES = ("forward", "backward", "update")
BY_HAND, TORCH = "PyTorch by hand", "engine.backend = torch"
LR = 1e-6
Enter = Callable[[str], None]
"""Called with the name of a phase as it begins."""


class Case(NamedTuple):
    """engine: BY_HAND (PyTorch without this package's engine), TORCH (`engine.backend`), or a file of ds_configs/."""

    engine: str
    precision: str
    compiled: bool

    @property
    def name(self) -> str:
        return f"{self.engine}, {self.precision}" + (", compiled" if self.compiled else "")


class Step(Protocol):
    """One training step; enters each of PHASES as it begins. Returns the loss."""

    def __call__(self, enter: Enter) -> Tensor: ...


@dataclass
class Measured:
    """cpu_ms: phase -> CPU time of this process, one entry per step. wall_ms: of each step. operators: by phase, of one
    step; None where a graph was compiled. reads: place -> values read from the device in one step. parameters: tensors
    of the method. notes: what the engine says of its fast paths.
    """

    case: Case
    cpu_ms: dict[str, list[float]]
    wall_ms: list[float]
    operators: dict[str, int] | None
    reads: dict[str, int]
    loss: float
    parameters: int
    notes: list[str] = field(default_factory=list)

    def median(self, phase: str) -> float:
        return statistics.median(self.cpu_ms[phase])

    @property
    def totals(self) -> list[float]:
        """CPU ms of each step."""
        return [sum(step) for step in zip(*(self.cpu_ms[phase] for phase in PHASES), strict=True)]


class StepByHand:
    """What a careful user writes: one module, autocast, AdamW in one kernel per tensor."""

    def __init__(self, config: RunConfig, case: Case, batch: Batch, targets: Mapping[str, Targets]) -> None:
        self._method = setup.make_method(config, _described(config))
        self._batch, self._targets, self._clip = batch, targets, config.optim.clip
        self._method.before_run(_synthetic.SAMPLES)
        groups = [
            {"params": g["params"], "weight_decay": g["weight_decay"]}
            for g in method_groups(self._method, config.optim)
        ]
        kind = optimizer_class(config.optim.name)
        self._optimizer = kind.TORCH(groups, lr=LR, **kind.options(config.optim, fused=True))  # type: ignore[call-arg]
        self._forward: Any = torch.compile(self._method, dynamic=False) if case.compiled else self._method
        self._autocast = torch.autocast("cpu", torch.bfloat16) if case.precision == "bf16" else nullcontext()
        self.parameters = sum(1 for _ in self._method.parameters())
        self.notes = list[str]()

    def __call__(self, enter: Enter) -> Tensor:
        enter("forward")
        with self._autocast:
            loss: Tensor = self._forward(self._batch, self._targets)["loss"]
        enter("backward")
        loss.backward()
        enter("update")
        if self._clip:
            nn.utils.clip_grad_norm_(self._method.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class EngineStep:
    """The same through `mimscale.engine`, as the training loop calls it."""

    def __init__(self, config: RunConfig, case: Case, batch: Batch, targets: Mapping[str, Targets]) -> None:
        world = World(0, 1, 0, torch.device("cpu"))
        ds_config = load_ds_config(config.engine.ds_config)
        self._method = setup.make_method(config, _described(config))
        self.parameters = sum(1 for _ in self._method.parameters())
        none = TeacherEnsemble({}, {}, {}, config.data.image_size, world.device)
        micro_batch = config.schedule.global_batch
        self._engine = setup.connect(
            self._method,
            none,
            config,
            world,
            micro_batch=micro_batch,
            accumulation=1,
            ds_config=ds_config,
            samples=_synthetic.SAMPLES,
        )
        self._batch, self._targets, self._clip = batch, targets, config.optim.clip

    @property
    def notes(self) -> list[str]:
        return list(self._engine.notes)

    def __call__(self, enter: Enter) -> Tensor:
        def between(loss: Tensor) -> Tensor:
            enter("backward")
            return loss

        enter("forward")
        outputs = self._engine.forward_backward(self._batch, self._targets, between)
        enter("update")
        self._engine.step(LR, self._clip)
        return outputs["loss"]


def build(config: RunConfig, case: Case, batch: Batch, targets: Mapping[str, Targets]) -> StepByHand | EngineStep:
    """The step of a case on a narrow recipe. The process group must be open."""
    values: dict[str, Any] = {}
    if case.engine == BY_HAND:
        return StepByHand(config, case, batch, targets)
    values["compile"] = "blocks" if case.compiled else "off"
    if case.engine == TORCH:
        values |= {"backend": "torch", "ds_config": f"cpu_zero2_{case.precision}"}
    else:
        values["ds_config"] = case.engine
    engine = config.engine.model_copy(update=values)
    return EngineStep(config.model_copy(update={"engine": engine}), case, batch, targets)


def measure(config: RunConfig, cases: list[Case], *, rounds: int, steps: int, warm_up: int = 3) -> list[Measured]:
    """Every case on the same weights and images, `rounds` times `steps` steps in turns, so that a slow moment of the
    machine slows all of them.

    The targets of the narrow teachers are computed once; their own time and operators do not count.
    """
    skeletons = build_skeletons(config.teachers, config.data.image_size)
    method = setup.make_method(config, describe(skeletons))
    teachers = TeacherEnsemble(
        config.teachers, skeletons, method.needs.teachers, config.data.image_size, torch.device("cpu")
    )
    method.before_run(_synthetic.SAMPLES)
    batch = _synthetic.make_batch(config, method.needs, config.schedule.global_batch, method.needs.uncropped_images)
    prepared = method.prepare(batch).normalised()
    with torch.no_grad():
        targets = teachers(prepared.images)
    del method
    if any(case.compiled for case in cases):
        _compile_each()
    built = [build(config, case, prepared, targets) for case in cases]
    for step in built:
        for _ in range(warm_up):
            step(lambda phase: None)
    cpu_ms: list[dict[str, list[float]]] = [{phase: [] for phase in PHASES} for _ in cases]
    wall_ms: list[list[float]] = [[] for _ in cases]
    for _ in range(rounds):
        for step, taken, wall in zip(built, cpu_ms, wall_ms, strict=True):
            for _ in range(steps):
                start_s = time.perf_counter()
                for phase, spent in timed(step).items():
                    taken[phase].append(spent)
                wall.append(1000 * (time.perf_counter() - start_s))
    found = []
    for case, step, taken, wall in zip(cases, built, cpu_ms, wall_ms, strict=True):
        counter, loss = count(step)
        operators = None if case.compiled else counter.operators
        found.append(
            Measured(case, taken, wall, operators, dict(counter.reads), float(loss), step.parameters, step.notes)
        )
    return found


def _compile_each() -> None:
    """All engines of this process share the code that is compiled: PyTorch's limit of graphs for one function, which a
    run with its one engine stays far below, would leave the later ones eager.
    """
    import torch._dynamo.config as dynamo

    for name in ("recompile_limit", "accumulated_recompile_limit", "cache_size_limit", "accumulated_cache_size_limit"):
        if hasattr(dynamo, name):
            setattr(dynamo, name, 10_000)


def timed(step: Step) -> dict[str, float]:
    """CPU ms of each phase of one step, of all threads of this process."""
    times: list[tuple[str, float]] = []
    step(lambda phase: times.append((phase, time.process_time())))
    times.append(("end", time.process_time()))
    return {phase: 1000 * (after - at) for (phase, at), (_, after) in zip(times, times[1:], strict=False)}


def count(step: Step) -> tuple[OperatorCount, Tensor]:
    """Operators and reads of one step, and its loss."""
    with _operators.counting("forward") as counter:

        def enter(phase: str) -> None:
            counter.phase = phase

        loss = step(enter)
    return counter, loss


def ratio(ours: list[float], theirs: list[float], steps: int) -> float:
    """How many times the reference's time a step takes: the median of the ratios inside each round of `steps`."""
    rounds = range(0, len(ours), steps)
    pairs = [(statistics.median(ours[r : r + steps]), statistics.median(theirs[r : r + steps])) for r in rounds]
    return statistics.median([a / b for a, b in pairs]) if pairs else math.nan


def precision_of_file(name: str) -> str:
    return precision_of(load_ds_config(name))


def _described(config: RunConfig) -> Any:
    return describe(build_skeletons(config.teachers, config.data.image_size))
