"""What panels show: the same images throughout a run, so that one sees what training changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mimscale.data.device_prefetch import DevicePrefetcher
from mimscale.data.loader import TrainLoader
from mimscale.monitoring.panels import SAMPLES
from mimscale.training.context import TrainContext
from mimscale.types import Batch, PrefetchedBatch, StepInfo, Targets


class PanelInputs:
    """The first images of the run's order with their crops and noise of the first epoch, read at the first panel: the
    same in every panel, on any number of ranks and after every resume.

    A stream, a method that mixes images, and data that cannot be read: those of the last step instead.
    """

    def __init__(self, run: TrainContext) -> None:
        self._run = run
        self._fixed: tuple[Batch, Mapping[str, Targets]] | None = None
        self._tried = run.checked.config.data.stream is not None or run.method.needs.mixing is not None

    def of(self, info: StepInfo) -> tuple[Batch, Mapping[str, Targets]]:
        """Normalised on the device, and every teacher's targets. Collective."""
        run = self._run
        if not self._tried:
            self._tried = True
            try:
                prefetched = run.coordinator.on_all_ranks(self._read)
            except Exception as error:  # of storage or images, and the same on all ranks
                run.logger.print(f"panels show the images of their step: {' '.join(str(error).split())[:200]}")
            else:
                batch = prefetched.take()
                self._fixed = batch, run.teachers(batch.images)
        if self._fixed is None:
            return info.batch.first(SAMPLES), {name: seen.first(SAMPLES) for name, seen in info.targets.items()}
        batch, targets = self._fixed
        return run.method.prepare_view(batch), targets

    def _read(self) -> PrefetchedBatch:
        checked, needs = self._run.checked, replace(self._run.method.needs, uncropped_images=0)
        data = checked.config.data.model_copy(update={"workers": 0, "crops": 1})
        loader = TrainLoader(
            checked.manifest,
            data,
            needs,
            seed=checked.config.seed,
            global_batch=SAMPLES,
            micro_batch=SAMPLES,
            rank=0,
            world=1,
        )
        try:
            return next(DevicePrefetcher(iter(loader), checked.world.device))
        finally:
            loader.close()
