"""Evaluation while a run trains: protocols, RankMe and feature spread of the frozen student on a fixed subset.

Nothing of the run is touched: the student is copied, images are read by threads and kept, and random generators are put
back. All ranks share the forward passes and the work of the protocols.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mimscale.config.base import Strict
from mimscale.config.registry import first_line
from mimscale.data.config import DataConfig
from mimscale.data.manifest import Manifest
from mimscale.data.wds_stream import Source
from mimscale.distributed.coordination import Coordinator
from mimscale.distributed.world import World
from mimscale.errors import UserError
from mimscale.evals.config import EvalsConfig
from mimscale.evals.features import frozen
from mimscale.evals.frozen_student import STUDENT, StudentSkeleton, copied
from mimscale.evals.overlap import check_shards_apart
from mimscale.evals.parallel import all_rows
from mimscale.evals.protocols.base import Context, Features, Protocol
from mimscale.evals.runner import check_several_classes, protocol_class
from mimscale.evals.spectrum import rankme, spread
from mimscale.evals.subset import Subset, evenly_spread, part_of, read_images
from mimscale.types import normalised


@dataclass(frozen=True)
class CheckedEvals:
    """A section `evals` that passed every check. every: steps between evaluations. protocols: name -> its options."""

    config: EvalsConfig
    train: Subset
    val: Subset
    every: int
    protocols: Mapping[str, Strict]
    image_size: int
    threads: int
    seed: int

    def due(self, step: int, total: int) -> bool:
        """Whether the student is evaluated after `step` optimiser steps: every so many, and at the end."""
        return step == total or step % self.every == 0


def prepare(config: EvalsConfig, data: DataConfig, source: Source, global_batch: int, seed: int) -> CheckedEvals:
    """Open and check what an evaluation needs. source: the data set that the run trains on. Raises UserError."""
    if config.train is None and not isinstance(source, Manifest):
        raise UserError(
            "evals.train is missing: data.shards is no single data set with an index; set it to a labelled folder"
        )
    train = source if config.train is None and isinstance(source, Manifest) else _opened("train", config.train)
    val = _opened("val", config.val)
    protocols: dict[str, Strict] = {}
    subsets = (evenly_spread(train, config.train_samples), evenly_spread(val, config.val_samples))
    labelled = False
    for name, options in config.protocols.items():
        kind = protocol_class(name)
        protocols[name] = _options(name, kind, options)
        labelled = labelled or "labels" in kind.needs
    for key, manifest in (("train", train), ("val", val)):
        if labelled and (manifest.labels is None or int(manifest.labels.min()) < 0):
            raise UserError(
                f"evals.{key} = {manifest.location} has samples without labels; name a labelled data set, or set "
                f"evals.protocols={{}} for RankMe and spread alone"
            )
    if labelled and train.classes != val.classes:
        raise UserError(
            f"evals.val = {val.location} has other classes than evals.train = {train.location}; both need the same "
            f"classes in one order"
        )
    given = f"evals.val = {val.location}"
    check_shards_apart(f"evals.train = {train.location}", train, given, val)
    if isinstance(source, Manifest) and source is not train:
        check_shards_apart(f"data.shards = {source.location}", source, given, val)
    for name, options_of in protocols.items():
        try:
            if "labels" in protocol_class(name).needs:
                check_several_classes(subsets[0].labels.numpy(), "evals.train")
            protocol_class(name).check(options_of, *(subset.as_manifest() for subset in subsets))
        except UserError as error:
            raise UserError(f"evals.protocols.{name}: {error} (or raise evals.train_samples)") from None
    every = config.interval(sum(len(subset.ids) for subset in subsets), global_batch)
    return CheckedEvals(config, *subsets, every, protocols, data.image_size, max(1, data.workers), seed)


def _opened(key: str, folder: Any) -> Manifest:
    try:
        return Manifest.load(folder)
    except UserError as error:
        raise UserError(f"evals.{key} = {folder}: {error}") from None


def _options(name: str, kind: type[Protocol], options: Mapping[str, Any]) -> Strict:
    if "pooled" not in kind.needs:
        raise UserError(
            f"evals.protocols: '{name}' does not learn from pooled features; measure it after the run with "
            f"`mimscale evaluate {name}`"
        )
    try:
        return kind.Config.model_validate(dict(options))
    except ValidationError as error:
        raise UserError(first_line(error, kind.Config, ("evals", "protocols", name))) from None


class Evaluation(NamedTuple):
    """metrics: name -> value; those of protocols are in percent. warnings: of the protocols."""

    metrics: dict[str, float]
    warnings: list[str]


class Evaluator:
    """One per run; made before the engine gets the method. `evaluate` is collective."""

    def __init__(
        self, checked: CheckedEvals, student: Any, world: World, coordinator: Coordinator, precision: str
    ) -> None:
        if checked.config.pool == "cls" and not student.prefix:
            raise UserError("evals.pool = cls: this student has no class token; set evals.pool to mean")
        self.checked, self._world, self._coordinator = checked, world, coordinator
        self._skeleton = StudentSkeleton(student)
        kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        # a CPU computes fp16 in emulation, if at all
        self._dtype = torch.float32 if precision == "fp16" and world.device.type == "cpu" else kinds[precision]
        self._images: tuple[Tensor, Tensor] | None = None

    @property
    def notes(self) -> list[str]:
        checked = self.checked
        names = ", ".join([*checked.protocols, "RankMe", "spread"])
        return [
            f"evals: {names} every {checked.every} steps on {len(checked.train.ids)} training and "
            f"{len(checked.val.ids)} validation images"
        ]

    def evaluate(
        self, parameters: Callable[[str], Iterator[tuple[str, Tensor]]], buffers: Iterable[tuple[str, Tensor]]
    ) -> Evaluation:
        """Measure the student. Raises, on all ranks alike, whatever went wrong.

        parameters: `mimscale.engine.base.Engine.parameters`, which gathers them where ZeRO has split them. buffers: the
        student's, by name.
        """
        with _generators_kept(self._world.device):
            agree = self._coordinator.on_all_ranks
            if self._images is None:
                self._images = agree(self._read)
            student = self._student(parameters, buffers)
            train_part, val_part = agree(self._features, student)
            place = self._world.rank, self._world.size
            train = all_rows(train_part, len(self.checked.train.ids), *place)
            val = all_rows(val_part, len(self.checked.val.ids), *place)
            return agree(self._measure, train, val)

    def _read(self) -> tuple[Tensor, Tensor]:
        checked, world = self.checked, self._world
        parts = [part_of(subset, world.rank, world.size) for subset in (checked.train, checked.val)]
        first, second = (
            read_images(part, checked.image_size, checked.config.crop_pct, checked.threads) for part in parts
        )
        return first, second

    def _student(
        self, parameters: Callable[[str], Iterator[tuple[str, Tensor]]], buffers: Iterable[tuple[str, Tensor]]
    ) -> nn.Module:
        taken: list[tuple[str, Tensor]] = []
        failure: Exception | None = None
        try:  # every rank goes through all parameters; what fails is agreed on afterwards
            taken = copied(parameters(STUDENT), self._dtype)
        except Exception as error:
            failure = error

        def fill() -> nn.Module:
            if failure is not None:
                raise failure
            floating = [(n, b.to(self._dtype, copy=True) if b.is_floating_point() else b.clone()) for n, b in buffers]
            found: nn.Module = self._skeleton.filled([*taken, *floating])
            return found

        return self._coordinator.on_all_ranks(fill)

    def _features(self, student: Any) -> tuple[Tensor, Tensor]:
        """float32 [n of this rank, D] of both subsets, on the device."""
        assert self._images is not None
        checked, device = self.checked, self._world.device
        extract = frozen(student, (checked.config.pool,))
        found = []
        for images in self._images:
            pieces = [
                extract(normalised(piece.to(device)).to(self._dtype))[checked.config.pool]
                for piece in images.split(checked.config.batch)
                if len(piece)
            ]
            width = student.config.width
            found.append(torch.cat(pieces) if pieces else torch.empty(0, width, device=device))
        return found[0], found[1]

    def _measure(self, train_ND: Tensor, val_MD: Tensor) -> Evaluation:
        if not (train_ND.isfinite().all() and val_MD.isfinite().all()):
            raise ValueError("the student's features are not finite")
        checked, device = self.checked, self._world.device
        metrics, warnings = dict[str, float](), list[str]()
        labels = checked.train.labels, checked.val.labels
        classes = 1 + max(int(of.max()) for of in labels)
        context = Context(classes, checked.seed, device, self._world.rank, self._world.size)
        on_host = train_ND.cpu(), val_MD.cpu()
        for name, options in checked.protocols.items():
            kind = protocol_class(name)
            train, val = (Features(values.clone(), of) for values, of in zip(on_host, labels, strict=True))
            results = kind(options, context).run(train, val)
            metrics |= {key: float(results[key]) for key in kind.metrics if key in results}
            warnings += [f"{name}: {line}" for line in results.get("warnings", ())]
        return Evaluation({**metrics, "rankme": rankme(train_ND), "spread": spread(train_ND)}, warnings)


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    """The global random generators are afterwards as they were before, whatever a protocol draws from them."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
