"""All that a resumed run needs besides the tensors, as one object that goes into the checkpoint's manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

SCHEMA = 2


@dataclass(frozen=True)
class TrainState:
    """step: optimiser steps taken or skipped. Schedule and, with `jumps`, data position are functions of it.

    samples: images consumed by these steps, step x global batch. train_s: seconds inside the loop, over all launches.
    launches: how often the run was started. jumps: (step, global batches) that the guard left out before that step.
    rollbacks: how often it did. guard: its statistics.
    """

    step: int = 0
    samples: int = 0
    train_s: float = 0.0
    launches: int = 0
    jumps: tuple[tuple[int, int], ...] = ()
    rollbacks: int = 0
    guard: dict[str, Any] = field(default_factory=dict)

    def advanced(self, global_batch: int, seconds: float) -> TrainState:
        return replace(self, step=self.step + 1, samples=self.samples + global_batch, train_s=self.train_s + seconds)

    def launched(self) -> TrainState:
        return replace(self, launches=self.launches + 1)

    def rolled_back(self, to: TrainState, jumps: tuple[tuple[int, int], ...]) -> TrainState:
        """`to`, the state of an older checkpoint, with the jumps that keep it off the samples that led here."""
        return replace(to, jumps=jumps, rollbacks=self.rollbacks + 1, launches=self.launches, train_s=self.train_s)

    def dump(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def load(cls, values: Mapping[str, Any]) -> TrainState:
        if values.get("schema") != SCHEMA:
            raise ValueError(f"train state has schema {values.get('schema')}, this version reads {SCHEMA}")
        fields = {key: value for key, value in values.items() if key != "schema"}
        return cls(**{**fields, "jumps": tuple((step, batches) for step, batches in fields["jumps"])})
