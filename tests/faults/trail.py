"""Which samples made the weights: every checkpoint carries the ids of all the steps that led to it.

Planted into the trainer: what goes into the engine's `forward_backward` is noted, steps that the guard skipped are
emptied, the notes of all ranks go into the saved train state and come back with it. So the trail in the last checkpoint
is that of the last weights by construction, however often the run was killed and from wherever it went on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mimscale.training.monitor
from mimscale.data.manifest import Manifest
from mimscale.data.order import Order, batch_of
from mimscale.engine.deepspeed_engine import DeepSpeedEngine
from mimscale.fault_tolerance.step_guard import StepGuard
from mimscale.training.state import TrainState
from tests import ranks

Step = list[tuple[int, int]]  # (position in the endless sequence, sample id) of a step's samples


def plant() -> None:
    """Wrap what the loop calls."""
    saved: list[Step] = []  # of all ranks, up to the last checkpoint
    since: list[Step] = []  # of this rank, after it
    under_way: Step = []
    forward_backward, update, load = DeepSpeedEngine.forward_backward, StepGuard.update, TrainState.load
    describe_state = mimscale.training.monitor.describe_state

    def noted(self: DeepSpeedEngine, batch: Any, *rest: Any) -> Any:
        under_way.extend(zip(batch.positions.tolist(), batch.ids.tolist(), strict=True))
        return forward_backward(self, batch, *rest)

    def ended(self: StepGuard, skipped: bool, loss_scale: float | None) -> bool:
        since.append([] if skipped else under_way.copy())
        under_way.clear()
        return update(self, skipped, loss_scale)

    def described(context: Any, state: TrainState) -> dict[str, Any]:
        for steps in zip(*context.coordinator.gather(since), strict=True):
            saved.append([sample for of_rank in steps for sample in of_rank])
        since.clear()
        meta = describe_state(context, state)
        return {**meta, "state": {**meta["state"], "trail": saved.copy()}}

    def loaded(values: Mapping[str, Any]) -> TrainState:
        saved[:] = values["trail"]
        since.clear()
        return load({key: value for key, value in values.items() if key != "trail"})

    DeepSpeedEngine.forward_backward = noted  # type: ignore[method-assign, assignment]
    StepGuard.update = ended  # type: ignore[method-assign]
    TrainState.load = loaded  # type: ignore[method-assign]
    mimscale.training.monitor.describe_state = described  # type: ignore[assignment]


@dataclass(frozen=True)
class Samples:
    """What became of the samples of the steps that led to the last weights.

    lost: positions of the planned sequence that no step took; unnamed: those of them that the run did not write down.
    repeated: positions taken more than once. replaced: positions where another sample stood in. sequence: the trail.
    """

    lost: int
    unnamed: int
    repeated: int
    replaced: int
    sequence: list[Step]

    @property
    def all_there(self) -> bool:
        return not (self.lost or self.repeated or self.replaced)


def samples(run_dir: Path, shards: Path, steps: int) -> Samples:
    """Compare the trail in a run's newest checkpoint with the order, which is a pure function of the seed."""
    meta = ranks.meta(run_dir)
    config, trail = meta["config"], meta["state"]["trail"]
    size = config["schedule"]["global_batch"]
    order = Order(Manifest.load(shards), config["seed"], config["data"]["streams"], config["data"]["block"])
    taken = [(position, sample) for step in trail for position, sample in step]
    positions = [position for position, _ in taken]
    due = order.ids(positions).tolist()
    lost = set(range(steps * size)) - set(positions)
    return Samples(
        lost=len(lost),
        unnamed=sum(position // size not in _named(run_dir) for position in lost),
        repeated=len(positions) - len(set(positions)),
        replaced=sum(sample != expected for (_, sample), expected in zip(taken, due, strict=True)),
        sequence=trail,
    )


def _named(run_dir: Path) -> set[int]:
    """Global batches that the run says it skipped or left out."""
    jumps = ranks.meta(run_dir)["state"]["jumps"]
    skipped = {batch_of(event["at"] - 1) for event in ranks.lines(run_dir) if event.get("event") == "skipped"}
    later = {batch_of(event["at"] - 1, jumps) for event in ranks.lines(run_dir) if event.get("event") == "skipped"}
    path = run_dir / "left_out.jsonl"
    left_out = {json.loads(line)["batch"] for line in path.read_text().splitlines()} if path.exists() else set()
    return skipped | later | left_out
