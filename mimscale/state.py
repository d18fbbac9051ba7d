"""All that a resumed run needs besides the tensors, as one object that goes into the checkpoint's manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class TrainState:
    """step: optimiser steps taken or skipped. Data position (step x global batch) and schedule are functions of it.

    samples: images consumed, which must equal that product. train_s: seconds inside the loop, over all launches.
    launches: how often the run was started.
    """

    step: int = 0
    samples: int = 0
    train_s: float = 0.0
    launches: int = 0

    def advanced(self, global_batch: int, seconds: float) -> TrainState:
        return replace(self, step=self.step + 1, samples=self.samples + global_batch, train_s=self.train_s + seconds)

    def launched(self) -> TrainState:
        return replace(self, launches=self.launches + 1)

    def dump(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def load(cls, values: Mapping[str, Any]) -> TrainState:
        if values.get("schema") != SCHEMA:
            raise ValueError(f"train state has schema {values.get('schema')}, this version reads {SCHEMA}")
        return cls(**{key: value for key, value in values.items() if key != "schema"})
