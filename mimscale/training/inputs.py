"""The data side of a step: micro-batches of this rank on the device, and what the teachers make of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mimscale.data.augment import DeviceAugmentation
from mimscale.data.device_prefetch import DevicePrefetcher
from mimscale.data.loader import TrainLoader
from mimscale.methods.base import Method
from mimscale.monitoring.damage_log import DamageLog
from mimscale.monitoring.phase_timer import FORWARD, WAITING, PhaseTimer
from mimscale.teachers.ensemble import TeacherEnsemble
from mimscale.teachers.prefetcher import TeacherPrefetcher
from mimscale.training.checked_run import CheckedRun
from mimscale.training.state import TrainState
from mimscale.types import Batch, Targets


class TrainInputs:
    """Micro-batches in the order of the data, from the step on at which it was last started.

    ids: int64 [B] each, the samples of the micro-batches of the step under way, or of the last one.
    """

    def __init__(
        self, checked: CheckedRun, method: Method, teachers: TeacherEnsemble, timer: PhaseTimer, damage_log: DamageLog
    ) -> None:
        self._checked, self._method, self._teachers = checked, method, teachers
        self._timer, self._damage_log = timer, damage_log
        self._loader: TrainLoader | None = None
        self.ids: list[Tensor] = []

    def start(self, state: TrainState) -> None:
        """Start workers at the state's step; those that run are ended first."""
        self.close()
        checked, config, device = self._checked, self._checked.config, self._checked.world.device
        self._loader = TrainLoader(
            checked.manifest,
            config.data,
            self._method.needs,
            seed=config.seed,
            global_batch=config.schedule.global_batch,
            micro_batch=checked.micro_batch,
            rank=checked.world.rank,
            world=checked.world.size,
            start_step=state.step,
            jumps=state.jumps,
            pin=device.type == "cuda",
        )
        augment = DeviceAugmentation(config.data, self._method.needs.mixing, checked.micro_batch)
        batches = DevicePrefetcher(iter(self._loader), device, augment)
        ahead = config.engine.teachers_ahead
        self._prefetcher = TeacherPrefetcher(self._teachers, device, batches, ahead=ahead, prepare=self._method.prepare)

    def wait_for_first(self) -> None:
        """Wait until the workers have made a batch. The next `next_batch` returns it."""
        self._timer.enter(WAITING)
        self._prefetcher.next_batch()

    def next_batch(self) -> tuple[Batch, Mapping[str, Targets]]:
        """The next micro-batch, normalised on the device, and every teacher's targets for it."""
        self._timer.enter(WAITING)
        raw = self._prefetcher.next_batch()
        if len(self.ids) == self._checked.accumulation:
            self.ids = []
        ids = raw.ids[: self._checked.micro_batch]  # the others are partners that images are mixed with
        self.ids.append(ids.clone())  # the loader's memory is given back
        self._timer.ids = self.ids  # not before there are any: who waits for data reports the last step's samples
        self._damage_log.add(raw.damage)
        self._timer.enter(FORWARD)
        return self._prefetcher.targets()

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()
            self._loader = None
