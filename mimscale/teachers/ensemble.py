"""All teachers of a run behind one call.

A teacher is built once without memory (`build_skeletons`, before the process group opens): that shows its width, depth
and grid and most mistakes of the recipe. `TeacherEnsemble` then loads weights into these skeletons.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mimscale.config.compiler import compiler_fault, options, uncompiled
from mimscale.errors import UserError
from mimscale.teachers import kernels, quantise, weights
from mimscale.teachers.base import DTYPES, Teacher, check_needs, fault_of
from mimscale.teachers.config import TeacherConfig
from mimscale.teachers.cuda_graphs import GraphedTeacher
from mimscale.types import Targets, TeacherInfo, TeacherNeeds


def adapter(library: str) -> Any:
    """The adapter module of a library; imported only if a run uses that library."""
    return importlib.import_module(f"mimscale.teachers.{library}_adapter")


def build_skeleton(name: str, config: TeacherConfig, default_image_size: int) -> Teacher:
    """The teacher on the meta device: without memory and without weights, offline. Raises UserError.

    default_image_size: of the run; `config.image_size` takes precedence.
    """
    quantise.check(name, config.precision)
    adapter(config.library)  # imported outside of the context: libraries compute tables at import
    with torch.device("meta"):
        return _build(name, config, default_image_size)


def build_skeletons(configs: Mapping[str, TeacherConfig], default_image_size: int) -> dict[str, Teacher]:
    """`build_skeleton` of each teacher. Raises UserError."""
    return {name: build_skeleton(name, config, default_image_size) for name, config in configs.items()}


def describe(skeletons: Mapping[str, Teacher]) -> dict[str, TeacherInfo]:
    """Width, depth and grid of each teacher at its image size."""
    return {name: skeleton.info for name, skeleton in skeletons.items()}


def _build(name: str, config: TeacherConfig, default_image_size: int) -> Teacher:
    teacher: Teacher = adapter(config.library).build(name, config, config.image_size or default_image_size)
    return teacher


def compiles(config: TeacherConfig, device: torch.device, fault: str) -> tuple[bool, str]:
    """(whether a teacher's blocks are compiled, why). fault: why this machine cannot, empty if it can."""
    if config.shard:
        return False, "its parameters are split over the ranks"
    if config.compile is False:
        return False, "compile = false"
    if config.compile == "auto" and device.type == "cpu":
        return False, "auto compiles on a GPU only"
    return not fault, fault or f"compile = {str(config.compile).lower()}"


def check_compiled(name: str, config: TeacherConfig, device: torch.device) -> None:
    """Refuse an eager 8-bit teacher on a GPU. Raises UserError."""
    if device.type == "cuda" and config.compile is False and quantise.is_quantised(config.precision):
        raise UserError(
            f"teachers.{name}.compile = false with precision = {config.precision}: uncompiled it takes twice the time "
            f"of bf16; remove compile, or use bf16"
        )


def load(
    name: str, config: TeacherConfig, skeleton: Teacher, device: torch.device, fused: bool = True
) -> tuple[Teacher, dict[str, Any]]:
    """Load a teacher's weights into its skeleton. Returns (the teacher on the device, its identity). Raises UserError.

    A random teacher is built anew, because its initialisation needs memory; the skeleton is then not used. fused: with
    the changes of `teachers.kernels`.
    """
    identity: dict[str, Any] = {"library": config.library, "model": config.model, "sha256": None, "random": False}
    if config.random:
        teacher = _build_random(name, config, skeleton.info.image_size, fused)
        identity["random"] = True
    else:
        assert next(skeleton.tower.parameters()).is_meta, f"teachers.{name}: a skeleton can be loaded once"
        teacher = skeleton
        path = weights.locate(
            name, config, lambda: adapter(config.library).hub_file(name, config), weights.downloads_allowed()
        )
        identity["sha256"] = weights.verify(name, config, path)
        factors: kernels.Factors = {}
        if fused:
            factors, teacher.changes = kernels.fuse(teacher.tower)
        teacher.load(weights.read(name, path), config.storage, f"teachers.{name}: {path}", factors)
    teacher.requires_grad_(False).eval().to(device)
    if config.precision == "int8" or config.precision == "fp8":
        quantise.quantise(teacher, config.precision)
    return teacher, identity


def compile_blocks(teacher: Teacher) -> None:
    """One by one, because `Teacher.forward` reads tokens between blocks; equal blocks share a graph of static shape."""
    for block in teacher.blocks:
        block.compile(dynamic=False, options=options())


def _build_random(name: str, config: TeacherConfig, image_size: int, fused: bool) -> Teacher:
    """Randomly initialised on the CPU, seeded by the teacher's name; the global generators are not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big"))
        teacher = _build(name, config, image_size)
    if fused:
        factors, teacher.changes = kernels.fuse(teacher.tower)
        kernels.scale_parameters(teacher.tower, factors)
    teacher.tower.to(DTYPES[config.storage])
    return teacher


class TeacherEnsemble:
    """The teachers that a method needs, loaded and frozen on one device.

    skeletons: from `build_skeletons`, for at least the teachers in `needs`; they become the teachers. image_size: of
    the run. fused: with the changes of `teachers.kernels`. Inside a SLURM job or with HF_HUB_OFFLINE=1 nothing is
    downloaded. Mistakes that do not depend on the weights are reported before any file is read. Raises UserError.
    """

    def __init__(
        self,
        configs: Mapping[str, TeacherConfig],
        skeletons: Mapping[str, Teacher],
        needs: Mapping[str, TeacherNeeds],
        image_size: int,
        device: torch.device,
        fused: bool = True,
    ) -> None:
        for name, wanted in needs.items():
            if name not in configs:
                raise UserError(f"the method needs teachers.{name}, which the recipe does not have; add that section")
            check_needs(skeletons[name].info, wanted)
        self.needs = dict(needs)
        self.teachers: dict[str, Teacher] = {}
        self.notes: list[str] = []  # for each teacher, which of its twins runs and why
        self._identities: dict[str, dict[str, Any]] = {}
        self._calls: dict[str, Callable[[Tensor, TeacherNeeds], Targets]] = {}
        for name in needs:
            home = torch.device("cpu") if configs[name].shard else device
            teacher, self._identities[name] = load(name, configs[name], skeletons[name], home, fused)
            self.teachers[name] = self._calls[name] = teacher
            compiled, why = compiles(configs[name], home, compiler_fault(home))
            if compiled:
                compile_blocks(teacher)
            self.notes.append(f"teachers.{name}: {'compiled' if compiled else 'eager'} ({why})")
            why = teacher.changes or ("nothing in it to replace" if fused else "as engine.plain says")
            self.notes.append(f"teacher_kernels: {'on' if teacher.changes else 'off'} for teachers.{name} ({why})")
        self._sharded = [name for name in needs if configs[name].shard]
        self._precisions = {name: configs[name].precision for name in needs}
        self._image_size, self._device = image_size, device

    def shard(self, split: Callable[[Teacher], Callable[[Tensor, TeacherNeeds], Targets]]) -> None:
        """Split the teachers with `shard: true` over the ranks. `split` returns what is called instead. Collective."""
        for name in self._sharded:
            self._calls[name] = split(self.teachers[name])

    def use_cuda_graphs(self) -> None:
        """From the next call on, each teacher that is not split is one CUDA graph, if the device is a GPU."""
        for name in self.teachers:
            why = "its parameters are split over the ranks" if name in self._sharded else ""
            why = why or ("" if self._device.type == "cuda" else "CUDA graphs need a CUDA device")
            if not why:
                self._calls[name] = GraphedTeacher(self._calls[name])
            self.notes.append(
                f"cuda_graphs: off for teachers.{name} ({why})" if why else f"cuda_graphs: on for teachers.{name}"
            )

    def check(self) -> None:
        """Refuse teachers whose targets are not finite for a flat, a smooth and a noisy image. Collective. Raises
        UserError.

        The images are the same on every rank, so all ranks refuse.
        """
        if not self.teachers:
            return
        noise = torch.Generator().manual_seed(0)
        sides = (1, 8, self._image_size)
        images = [F.interpolate(torch.randn(1, 3, s, s, generator=noise), (sides[-1], sides[-1])) for s in sides]
        with uncompiled():  # of another batch size than the run's
            targets = self(torch.cat(images).to(self._device))
        for name, result in targets.items():
            fault, precision = fault_of(result), self._precisions[name]
            if fault is not None:
                fix = "" if precision in ("fp32", "bf16") else "use bf16, or "
                raise UserError(
                    f"teachers.{name}.precision = {precision}: {fault} for a synthetic image; {fix}take other weights"
                )

    def __call__(self, images: Tensor) -> dict[str, Targets]:
        """float32 ImageNet-normalised [B, 3, H, W] on the device -> teacher -> its targets, as in `needs`."""
        pixels: dict[Any, Tensor] = {}
        targets = {}
        for name, teacher in self.teachers.items():
            if teacher.input not in pixels:
                pixels[teacher.input] = teacher.preprocess(images)
            targets[name] = self._calls[name](pixels[teacher.input], self.needs[name])
        return targets

    def identities(self) -> dict[str, dict[str, Any]]:
        """Which weights these are, for the checkpoint: name -> library, model, sha256 (null if random), random."""
        return {name: dict(identity) for name, identity in self._identities.items()}
