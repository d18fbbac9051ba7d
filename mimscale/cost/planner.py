"""Predictions for one recipe on one cluster, and the best way to run it there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

from mimscale.config.deepspeed import load_ds_config, precision_of
from mimscale.config.run import RunConfig, method_class
from mimscale.cost.communication import Collective, collectives, crossing
from mimscale.cost.devices import Device, Interconnect
from mimscale.cost.flops import Flops, flops_of_shapes, uncropped_share
from mimscale.cost.memory import Memory, Zero, memory
from mimscale.cost.step_time import StepTime, held, step_time
from mimscale.cost.trace import Shapes, Trace, at, build, trace
from mimscale.distributed.micro_batch import solve_micro_batch
from mimscale.errors import UserError

TRACED = (8, 16)
"""Micro-batches that are traced; all others follow, because everything in a trace is linear in the images."""
RECOMPUTE = (0, 4, 2, 1)
"""Values of engine.activation_checkpointing that are tried, from the fastest to the smallest."""
WORTH = 0.02
"""A choice that is less simple must be faster by this share."""


@dataclass(frozen=True)
class Choice:
    """One way to run a recipe: a DeepSpeed config, images per forward pass, forward passes per step, and which blocks
    are recomputed.
    """

    ds_config: str
    micro_batch: int
    accumulation: int
    recompute_every: int

    def overrides(self) -> list[str]:
        """For `mimscale train` and the batch scripts."""
        return [
            f"engine.ds_config={self.ds_config}",
            f"engine.max_micro_batch={self.micro_batch}",
            f"engine.activation_checkpointing={self.recompute_every}",
        ]


@dataclass(frozen=True)
class Prediction:
    """What a choice needs and takes. room: bytes that the GPU has for tensors. crossing: bytes that each node sends
    over its network per step.
    """

    choice: Choice
    zero: Zero
    memory: Memory
    room: float
    time: StepTime
    collectives: tuple[Collective, ...]
    crossing: float

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.room


class Planner:
    """A recipe on `ranks` GPUs, `per_node` of them on a node. Raises UserError where the recipe cannot work, or not on
    that many.

    FLOPs, memory and time of any choice come from few traces, which are kept.
    """

    def __init__(
        self,
        config: RunConfig,
        gpu: Device,
        link: Interconnect,
        ranks: int,
        per_node: int,
        shapes: Shapes | None = None,
    ) -> None:
        self.config, self.gpu, self.link = config, gpu, link
        self.ranks, self._node_size = ranks, per_node
        self.shapes = build(config) if shapes is None else shapes
        self._trace = lru_cache(maxsize=None)(self._traced)

    @property
    def per_node(self) -> int:
        """Ranks on a node."""
        return min(self._node_size, self.ranks)

    @property
    def nodes(self) -> int:
        return math.ceil(self.ranks / self.per_node)

    @cached_property
    def flops(self) -> Flops:
        return flops_of_shapes(self.shapes)

    @property
    def room(self) -> float:
        return self.gpu.memory - self.gpu.reserved

    def on(self, ranks: int, global_batch: int | None = None) -> Planner:
        """The same recipe on another number of GPUs, with the same traces. global_batch: another one."""
        schedule = self.config.schedule
        if global_batch is not None:
            schedule = schedule.model_copy(update={"global_batch": global_batch})
        return self.like(self.config.model_copy(update={"schedule": schedule}), self.gpu, self.link, ranks)

    def like(self, config: RunConfig, gpu: Device, link: Interconnect, ranks: int) -> Planner:
        """The same networks under another schedule, engine or cluster, with the same traces."""
        other = Planner(config, gpu, link, ranks, self._node_size, replace(self.shapes, config=config))
        other._trace = self._trace
        return other

    def _traced(self, precision: Literal["fp32", "bf16", "fp16"], recompute_every: int) -> tuple[Trace, Trace]:
        cuda = self.gpu.name != "cpu"
        first, second = (
            trace(self.shapes, images, precision, recompute_every=recompute_every, cuda=cuda) for images in TRACED
        )
        return first, second

    def asked(self) -> Choice:
        """The recipe's own choice on this many ranks. Raises UserError where the batch does not divide."""
        engine = self.config.engine
        most = engine.max_micro_batch
        if most == "auto":
            return self.fill(engine.ds_config, engine.activation_checkpointing)
        micro, accumulation = solve_micro_batch(self.config.schedule.global_batch, self.ranks, most)
        return Choice(engine.ds_config, micro, accumulation, engine.activation_checkpointing)

    def fill(self, ds_config: str, recompute_every: int) -> Choice:
        """The largest micro-batch that fits, 1 where none does."""
        fitting: Choice | None = None
        for micro in self._micro_batches():
            choice = Choice(ds_config, micro, self.config.schedule.global_batch // self.ranks // micro, recompute_every)
            fitting = choice
            if self.memory(choice).total <= self.room:
                break
        assert fitting is not None
        return fitting

    def _micro_batches(self) -> Iterator[int]:
        """Divisors of the images per rank, largest first. Raises UserError where the batch does not divide."""
        per_rank = math.prod(solve_micro_batch(self.config.schedule.global_batch, self.ranks, 2**62))
        return (size for size in range(per_rank, 0, -1) if per_rank % size == 0 and self._suits(size))

    def _suits(self, micro_batch: int) -> bool:
        """Whether the method can take this many images per rank: a probe's norm needs whole groups of them."""
        try:
            method_class(self.config.method.name).check_batch(self.config, micro_batch * self.ranks)
        except UserError:
            return False
        return True

    def memory(self, choice: Choice, stage: int | None = None) -> Memory:
        """What a choice allocates on each GPU. stage: another ZeRO stage than that of its config."""
        zero = Zero.of(load_ds_config(choice.ds_config))
        zero = zero if stage is None else replace(zero, stage=stage)
        traced = at(*self._trace(zero.precision, choice.recompute_every), choice.micro_batch)
        return self._memory(zero, traced, choice)

    def _memory(self, zero: Zero, traced: Trace, choice: Choice) -> Memory:
        fused = self.gpu.name != "cpu"
        return memory(self.shapes, zero, traced, self.ranks, accumulation=choice.accumulation, fused_update=fused)

    def predict(self, choice: Choice) -> Prediction:
        """Memory, communication and time of a choice. Raises UserError where the GPU lacks its precision."""
        zero = Zero.of(load_ds_config(choice.ds_config))
        if zero.precision not in self.gpu.peak:
            raise UserError(
                f"--gpu {self.gpu.name} has no {zero.precision} (engine.ds_config = {choice.ds_config}); use "
                f"engine.ds_config={choice.ds_config.replace(zero.precision, 'fp16')} and teachers in fp16"
            )
        traced = at(*self._trace(zero.precision, choice.recompute_every), choice.micro_batch)
        parameters = held(self.shapes, choice.recompute_every)
        found = collectives(zero, parameters.sizes, self.ranks, choice.accumulation)
        taken = step_time(
            self.shapes,
            zero,
            traced,
            parameters,
            gpu=self.gpu,
            link=self.link,
            ranks=self.ranks,
            per_node=self.per_node,
            accumulation=choice.accumulation,
            uncropped_per_image=uncropped_share(self.shapes),
        )
        used = self._memory(zero, traced, choice)
        over = crossing(found, self.ranks, self.per_node)
        return Prediction(choice, zero, used, self.room, taken, tuple(found), over)

    def ds_configs(self, stage: int) -> list[str]:
        """The files of ds_configs/ for a stage in the recipe's precision, on these devices; the usual one first."""
        precision = precision_of(load_ds_config(self.config.engine.ds_config))
        if self.gpu.name == "cpu":
            return [f"cpu_zero{stage}_{precision}"]
        if precision == "fp32":
            return [self.config.engine.ds_config]
        usual = f"zero{stage}_{precision}"
        return [usual, f"{usual}_slow_links"] if self.nodes > 1 else [usual]

    def best(self) -> Prediction | None:
        """The fastest choice that fits; of nearly equal ones (2 %) the simplest: ZeRO-2 before ZeRO-3, no recomputation
        before some, the usual file for the network before the other. None where nothing fits.

        The largest micro-batch that fits is the fastest of its kind, because smaller ones only add launches. A kind
        that fits all images of a rank ends the search: what follows saves memory and costs time.
        """
        best: Prediction | None = None
        for stage in (2, 3):
            for every in RECOMPUTE:
                for name in self.ds_configs(stage):
                    found = self.predict(self.fill(name, every))
                    if found.fits and (best is None or found.time.total < best.time.total * (1 - WORTH)):
                        best = found
                if best is not None and best.choice.accumulation == 1:
                    return best
            if best is not None:
                return best
        return None

    def why(self, best: Prediction) -> str:
        """The reason for the best choice, in a sentence."""
        choice, zero, global_batch = best.choice, best.zero, self.config.schedule.global_batch
        parts = []
        if zero.stage == 2:
            parts.append("ZeRO-2 fits, and ZeRO-3 would cost the host more")
        elif zero.stage == 3:
            parts.append("nothing fits under ZeRO-2, so the parameters are split too")
        if choice.ds_config.endswith("_slow_links"):
            parts.append("its messages for slow links take less time on this network")
        if choice.recompute_every:
            parts.append(f"every {_ordinal(choice.recompute_every)} block is recomputed, because without it less fits")
        else:
            parts.append("no block needs recomputation")
        per_rank = global_batch // self.ranks
        if choice.accumulation == 1:
            parts.append(
                f"a forward pass takes all {per_rank} images that a rank has of the global batch {global_batch}"
            )
        else:
            parts.append(f"{choice.micro_batch} images are the most that fit of the {per_rank} of a rank")
        return "; ".join(parts)

    def smallest_change(self, wanted: Prediction) -> Prediction | None:
        """Of the choices that differ from `wanted` in one thing and fit, the fastest: a smaller micro-batch, blocks
        that are recomputed, or ZeRO-3. None where more has to change.
        """
        choice = wanted.choice
        fitting = []
        for micro in self._micro_batches():
            if micro < choice.micro_batch:
                smaller = replace(
                    choice, micro_batch=micro, accumulation=choice.micro_batch * choice.accumulation // micro
                )
                if self.memory(smaller).total <= self.room:
                    fitting.append(smaller)
                    break
        for every in (every for every in RECOMPUTE[1:] if not choice.recompute_every or every < choice.recompute_every):
            fewer = replace(choice, recompute_every=every)
            if self.memory(fewer).total <= self.room:
                fitting.append(fewer)
                break
        split = replace(choice, ds_config=self.ds_configs(3)[0])
        if wanted.zero.stage < 3 and self.memory(split).total <= self.room:
            fitting.append(split)
        return min(map(self.predict, fitting), key=lambda one: one.time.total, default=None)


def changes(old: Choice, new: Choice) -> list[str]:
    """The overrides that lead from one choice to another."""
    return [now for was, now in zip(old.overrides(), new.overrides(), strict=True) if was != now]


def _ordinal(number: int) -> str:
    return {1: "single", 2: "second", 4: "fourth"}.get(number, f"{number}th")


def as_json(record: Any) -> Any:
    """Dataclasses and mappings as plain values."""
    if hasattr(record, "__dataclass_fields__"):
        return {name: as_json(getattr(record, name)) for name in record.__dataclass_fields__}
    if isinstance(record, dict):
        return {key: as_json(value) for key, value in record.items()}
    if isinstance(record, (list, tuple)):
        return [as_json(value) for value in record]
    return record
