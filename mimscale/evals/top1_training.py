"""The accuracy of a classifier while it trains: on the whole validation set, every so many epochs, at its own crop.

Nothing of the run is touched: a copy of the method is measured, images are read by threads, nothing random is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mimscale.config.run import RunConfig, method_class
from mimscale.data.manifest import Manifest
from mimscale.distributed.coordination import Coordinator
from mimscale.distributed.world import World
from mimscale.errors import UserError
from mimscale.evals.frozen_student import StudentSkeleton, copied
from mimscale.evals.parallel import all_sum
from mimscale.evals.subset import Subset, evenly_spread, part_of, read_images
from mimscale.evals.top1 import accuracy, count
from mimscale.evals.while_training import Evaluation

Named = Iterable[tuple[str, Tensor]]


def check(run: RunConfig, val: Manifest) -> None:
    """Raises UserError where the run trains no classifier, or one of other classes than those of `evals.val`."""
    assert run.evals is not None
    if run.evals.top1_epochs is None:
        return
    kind = method_class(run.method.name)
    if not hasattr(kind, "logits"):
        raise UserError(
            f"evals.top1_epochs = {run.evals.top1_epochs:g}: method {run.method.name} is no classifier; set it to null"
        )
    if val.labels is None or int(val.labels.min()) < 0:
        raise UserError(f"evals.val = {val.location} has samples without labels; name a labelled data set")
    classes = len(val.classes) if val.classes is not None else int(val.labels.max()) + 1
    outputs: int = getattr(run.method, "classes")  # noqa: B009  # of every method with logits
    if classes != outputs:
        raise UserError(f"evals.val = {val.location} has {classes} classes, but method.classes = {outputs}")


class Top1Evaluator:
    """One per run; made before the engine gets the method. `evaluate` is collective.

    every: optimiser steps between measurements.
    """

    def __init__(
        self,
        run: RunConfig,
        method: nn.Module,
        val: Manifest,
        steps_per_epoch: int,
        world: World,
        coordinator: Coordinator,
        precision: str,
    ) -> None:
        assert run.evals is not None and run.evals.top1_epochs is not None
        self.every = max(1, round(run.evals.top1_epochs * steps_per_epoch))
        self._run, self._world, self._coordinator = run, world, coordinator
        self._skeleton = StudentSkeleton(method)
        self._part = part_of(evenly_spread(val, val.samples), world.rank, world.size)
        on_cpu = precision == "fp16" and world.device.type == "cpu"  # computed there in emulation, if at all
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
            "fp32" if on_cpu else precision
        ]

    @property
    def notes(self) -> list[str]:
        assert self._run.evals is not None
        return [f"evals: top-1 and top-5 on {self._run.evals.val} every {self.every} steps"]

    def due(self, step: int, total: int) -> bool:
        return step == total or step % self.every == 0

    def evaluate(self, parameters: Callable[[str], Iterator[tuple[str, Tensor]]], buffers: Named) -> Evaluation:
        """Percent right at first, and among five. Raises, on all ranks alike, whatever went wrong.

        parameters: `mimscale.engine.base.Engine.parameters`. buffers: the method's, by name.
        """
        taken: list[tuple[str, Tensor]] = []
        failure: Exception | None = None
        try:  # every rank goes through all parameters; what fails is agreed on afterwards
            taken = copied(parameters(""), self._dtype, prefix="")
        except Exception as error:
            failure = error

        def counted() -> Tensor:
            if failure is not None:
                raise failure
            floating = [(n, b.to(self._dtype, copy=True) if b.is_floating_point() else b.clone()) for n, b in buffers]
            method: Any = self._skeleton.filled([*taken, *floating])
            return count(lambda images: method.logits(images.to(self._dtype)), self._pieces(), self._world.device)

        found = accuracy(all_sum(self._coordinator.on_all_ranks(counted)))
        return Evaluation({"top1": found.top1, "top5": found.top5}, [])

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        assert self._run.evals is not None
        data, batch = self._run.data, self._run.evals.batch
        for ids in np.split(self._part.ids, range(batch, len(self._part.ids), batch)):
            piece = Subset(self._part.manifest, ids)
            yield read_images(piece, data.image_size, data.eval_crop_pct, max(1, data.workers)), piece.labels
