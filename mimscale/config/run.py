"""One run, whole: every section of a recipe in one model, strict and typed.

Each package owns the model of its own section, in its `config.py`. The sections `method` and `optim` are validated by
the model of the method and the optimiser that they name (`mimscale.config.registry`), so adding one edits nothing here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, SerializeAsAny, model_validator

from mimscale.checkpoint.config import CheckpointConfig
from mimscale.config.base import Strict
from mimscale.config.difference import flat
from mimscale.config.registry import MethodConfig, class_in, names_in, section_by_name
from mimscale.data.config import DataConfig
from mimscale.engine.config import EngineConfig
from mimscale.evals.config import EvalsConfig, Expected
from mimscale.fault_tolerance.config import GuardConfig, WatchdogConfig
from mimscale.models.config import StudentConfig
from mimscale.monitoring.config import LogConfig
from mimscale.optim.config import EmaConfig, OptimConfig, ScheduleConfig
from mimscale.teachers.config import TeacherConfig
from mimscale.training.config import InitConfig


class RunConfig(Strict):
    """One run, whole. What shapes the result is in `shaping`; the rest may change at a resume.

    seed: of everything random: start, order of the samples, crops, masks, drop path. data: the images, their crops and
    the loader. student: the encoder that is trained. init: weights that a run starts from; null: a random start.
    teachers: frozen networks, by a name of your own. method: the method and its settings. optim: the optimiser and its
    settings. ema: a moving average of the student; null: none. schedule: length, global batch and learning rate.
    engine: precision, memory and speed. checkpoint: when a run saves. guard: steps that must not reach the weights.
    watchdog: ranks that hang. log: what is written while a run trains. evals: accuracy while a run trains; null: none.
    expected: what papers report, by protocol.
    """

    seed: int = 0
    data: DataConfig
    student: StudentConfig
    init: InitConfig | None = None
    teachers: dict[str, TeacherConfig] = Field(default_factory=dict)
    method: SerializeAsAny[MethodConfig]
    optim: SerializeAsAny[OptimConfig]
    ema: EmaConfig | None = None
    schedule: ScheduleConfig
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    log: LogConfig = LogConfig()
    evals: EvalsConfig | None = None
    expected: dict[str, Expected] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _sections_by_name(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        method, optim = values.get("method"), values.get("optim", {})
        found = dict(values)
        if isinstance(method, Mapping):
            found["method"] = section_by_name("mimscale.methods", method, "method.name")
        if isinstance(optim, Mapping):
            found["optim"] = section_by_name("mimscale.optim.optimizers", optim, "optim.name", {"name": "adamw"})
        return found

    @model_validator(mode="after")
    def _grid(self) -> RunConfig:
        if self.data.image_size % self.student.patch:
            raise ValueError(
                f"data.image_size = {self.data.image_size} is not a multiple of student.patch = {self.student.patch}"
            )
        return self

    @model_validator(mode="after")
    def _split_teachers_fit(self) -> RunConfig:
        split = next((name for name, teacher in self.teachers.items() if teacher.shard), None)
        if split is not None and self.engine.teachers_ahead:
            raise ValueError(
                f"engine.teachers_ahead = true with teachers.{split}.shard = true: a split teacher gathers in the "
                f"student's stream; set one of them to false"
            )
        if split is not None and self.engine.backend == "torch":
            raise ValueError(
                f"engine.backend = torch with teachers.{split}.shard = true: only DeepSpeed splits a teacher; set the "
                f"former to deepspeed or the latter to false"
            )
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the student's patch tokens."""
        side = self.data.image_size // self.student.patch
        return side, side

    def dump(self) -> dict[str, Any]:
        """Plain JSON-able values, complete: what is written into the run folder."""
        return self.model_dump(mode="json")

    def flat(self) -> dict[str, Any]:
        """The same as `section.key` -> value."""
        return flat(self.dump())

    def shaping(self) -> dict[str, Any]:
        """The flat `section.key` values that decide the result; a resume refuses a change in any of them."""
        free = (
            "engine.",
            "checkpoint.",
            "guard.",
            "watchdog.",
            "log.",
            "evals.",
            "expected.",
            "data.workers",
            "data.prefetch",
            "data.shards",
            "data.max_damaged",
            "data.cache",
        )
        values = self.flat()
        values["teachers"] = list(self.teachers)  # in this order: masks follow the first that has a class token
        return {
            key: value
            for key, value in values.items()
            if not key.startswith(free)
            and not key.endswith((".weights", ".compile"))
            and key not in ("evals", "expected")
        }


def method_names() -> list[str]:
    return names_in("mimscale.methods")


def method_class(name: str) -> Any:
    """The Method that the file mimscale/methods/<name>.py defines."""
    return class_in("mimscale.methods", name, "method.name")
