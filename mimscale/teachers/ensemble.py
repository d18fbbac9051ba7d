"""All teachers of a run behind one call."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mimscale.errors import UserError
from mimscale.teachers import quantise, weights
from mimscale.teachers.base import DTYPES, Teacher, check_needs, fault_of
from mimscale.teachers.config import TeacherConfig
from mimscale.types import Targets, TeacherInfo, TeacherNeeds


def adapter(library: str) -> Any:
    """The module that knows a library; imported only for the libraries that a run uses."""
    return importlib.import_module(f"mimscale.teachers.{library}_adapter")


def skeleton(name: str, config: TeacherConfig, default_image_size: int) -> Teacher:
    """The teacher without its weights (on the meta device): cheap at any size, and offline. Raises UserError."""
    adapter(config.library)  # imported before the context: libraries compute tables while they are imported
    with torch.device("meta"):
        return _build(name, config, default_image_size)


def describe(name: str, config: TeacherConfig, default_image_size: int) -> TeacherInfo:
    """Width, depth and grid of a teacher at its image size, else at the run's. Raises UserError."""
    quantise.check(name, config.precision)
    return skeleton(name, config, default_image_size).info


def _build(name: str, config: TeacherConfig, default_image_size: int) -> Teacher:
    teacher: Teacher = adapter(config.library).build(name, config, config.image_size or default_image_size)
    return teacher


def load(
    name: str, config: TeacherConfig, default_image_size: int, device: torch.device
) -> tuple[Teacher, dict[str, Any]]:
    """(teacher with its weights on a device, its identity). Raises UserError."""
    identity: dict[str, Any] = {"library": config.library, "model": config.model, "sha256": None, "random": False}
    if config.random:
        teacher = _random(name, config, default_image_size)
        identity["random"] = True
    else:
        teacher = skeleton(name, config, default_image_size)
        path = weights.locate(
            name, config, lambda: adapter(config.library).hub_file(name, config), weights.downloads_allowed()
        )
        identity["sha256"] = weights.verify(name, config, path)
        teacher.load(weights.read(name, path), config.storage, f"teachers.{name}: {path}")
    teacher.requires_grad_(False).eval().to(device)
    if config.precision == "int8" or config.precision == "fp8":
        quantise.quantise(teacher, config.precision)
    if config.compile:
        for block in teacher.blocks:  # one by one: the walk around them reads a few tokens of some
            block.compile()
    return teacher, identity


def _random(name: str, config: TeacherConfig, default_image_size: int) -> Teacher:
    """Seeded by the teacher's name alone, on the CPU; the global generators are left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big"))
        teacher = _build(name, config, default_image_size)
    teacher.tower.to(DTYPES[config.storage])
    return teacher


class TeacherEnsemble:
    """The teachers that a method needs, loaded and frozen on one device.

    Nothing is downloaded inside a SLURM job or with HF_HUB_OFFLINE=1. Every mistake that can be seen without the
    weights is reported before any is read. Raises UserError.
    """

    def __init__(
        self,
        configs: Mapping[str, TeacherConfig],
        needs: Mapping[str, TeacherNeeds],
        default_image_size: int,
        device: torch.device,
    ) -> None:
        for name, wanted in needs.items():
            if name not in configs:
                raise UserError(f"the method needs teachers.{name}, which the recipe does not have; add that section")
            check_needs(describe(name, configs[name], default_image_size), wanted)
        self.needs = dict(needs)
        self.teachers: dict[str, Teacher] = {}
        self._identities: dict[str, dict[str, Any]] = {}
        self._calls: dict[str, Callable[[Tensor, TeacherNeeds], Targets]] = {}
        for name in needs:
            home = torch.device("cpu") if configs[name].shard else device
            teacher, self._identities[name] = load(name, configs[name], default_image_size, home)
            self.teachers[name] = self._calls[name] = teacher
        self._sharded = [name for name in needs if configs[name].shard]
        self._compiled = any(configs[name].compile for name in needs)
        self._precisions = {name: configs[name].precision for name in needs}
        self._image_size, self._device = default_image_size, device

    def shard(self, split: Callable[[Teacher], Callable[[Tensor, TeacherNeeds], Targets]]) -> None:
        """Collective: split the teachers that ask for it over the ranks. `split` returns what is called instead."""
        for name in self._sharded:
            self._calls[name] = split(self.teachers[name])

    def check(self) -> None:
        """Refuse teachers that make no numbers of a flat, a smooth and a noisy picture. Collective. Raises UserError.

        Every rank looks at the same pictures, so all of them refuse.
        """
        if not self.teachers:
            return
        noise = torch.Generator().manual_seed(0)
        sides = (1, 8, self._image_size)
        pictures = [F.interpolate(torch.randn(1, 3, s, s, generator=noise), (sides[-1], sides[-1])) for s in sides]
        # compiled blocks would be slower for all time if they had seen a second size of batch
        with torch.compiler.set_stance("force_eager") if self._compiled else nullcontext():
            targets = self(torch.cat(pictures).to(self._device))
        for name, seen in targets.items():
            fault, precision = fault_of(seen), self._precisions[name]
            if fault is not None:
                fix = "" if precision in ("fp32", "bf16") else "use bf16, or "
                raise UserError(
                    f"teachers.{name}.precision = {precision}: {fault} for a made-up picture; {fix}take other weights"
                )

    def __call__(self, images: Tensor) -> dict[str, Targets]:
        """float32 ImageNet-normalised [B, 3, H, W] on the device -> teacher's name -> what was asked of it."""
        pixels: dict[Any, Tensor] = {}
        targets = {}
        for name, teacher in self.teachers.items():
            if teacher.input not in pixels:
                pixels[teacher.input] = teacher.preprocess(images)
            targets[name] = self._calls[name](pixels[teacher.input], self.needs[name])
        return targets

    def identities(self) -> dict[str, dict[str, Any]]:
        """Which weights these are, for the checkpoint's record: name -> library, model, sha256 (null if random)."""
        return {name: dict(identity) for name, identity in self._identities.items()}
