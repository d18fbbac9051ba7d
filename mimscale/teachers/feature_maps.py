"""Teachers that are convolutional networks of timm: one feature map, as patch tokens on the student's grid.

The map of one stride is the only level (level 0). There is no class token; with `attention: norm` the norm of each
position stands in for the CLS attention. Everything behind the map is cut off and not loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimscale.errors import UserError
from mimscale.teachers import efficientnet
from mimscale.teachers.base import Teacher, norm_attention, one_line
from mimscale.teachers.config import TeacherConfig
from mimscale.types import Targets, TeacherInfo, TeacherNeeds

STRIDE = 16  # unless the recipe says another
COARSEST = 2  # a map may be enlarged by this factor per side, not more


class Trunk(nn.Module):
    """A timm network up to one of its feature maps: pixels [B, 3, S, S] -> map [B, C, s, s]."""

    def __init__(self, network: Any, index: int) -> None:
        super().__init__()
        network.prune_intermediate_layers(indices=[index], prune_norm=True, prune_head=True)
        self.network, self.index = network, index

    def forward(self, pixels: Tensor) -> Tensor:
        maps = self.network.forward_intermediates(
            pixels, indices=[self.index], stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        found: Tensor = maps[0]
        return found


class MapTeacher(Teacher):
    """A convolutional network, on the device of the surrounding `torch.device` context."""

    def __init__(self, name: str, config: TeacherConfig, image_size: int, network: Any, stride: int) -> None:
        index = _strides(network).index(stride)
        dim, own = network.feature_info[index]["num_chs"], image_size // stride
        side = config.grid or own
        info = TeacherInfo(
            name, dim, 1, (side, side), image_size, False, norm_attention=config.attention == "norm", resizes=True
        )
        facts = network.pretrained_cfg
        mean, std = config.mean or facts["mean"], config.std or facts["std"]
        trunk = Trunk(network, index)
        trunk.requires_grad_(False).eval()
        super().__init__(trunk, info, 0, mean, std, config.norm_eps)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [self.tower]

    def embed(self, pixels: Tensor) -> Tensor:
        """The network's input; it has no tokens before the map."""
        return pixels

    def query_and_keys(self, block: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a feature map has no class token")

    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        wanted = self.tower.state_dict()
        named = efficientnet.to_timm(state, self.tower.get_submodule("network")) or state
        found = {f"network.{name}": tensor for name, tensor in named.items() if f"network.{name}" in wanted}
        counters = {name: torch.zeros(()) for name in wanted if name.endswith("num_batches_tracked")}
        return {**counters, **found}

    @torch.no_grad()
    def forward(self, pixels: Tensor, needs: TeacherNeeds) -> Targets:
        """As `Teacher.forward`; level 0 is the map [B, L, C] on the grid of `info`."""
        tokens_BLC = self._tokens(self.tower(pixels.to(next(self.tower.parameters()).dtype)))
        levels = {0: tokens_BLC} if needs.levels else {}
        return Targets(levels, {}, norm_attention(tokens_BLC) if needs.cls_attention else None)

    def _tokens(self, map_BCHW: Tensor) -> Tensor:
        """The map, resized to the grid where its own is another: bilinear, with antialiasing where it shrinks."""
        if map_BCHW.shape[-2:] != self.info.grid:
            resized = F.interpolate(map_BCHW.float(), self.info.grid, mode="bilinear", antialias=True)
            map_BCHW = resized.to(map_BCHW.dtype)
        return map_BCHW.flatten(2).transpose(1, 2).contiguous()


def build(name: str, config: TeacherConfig, model: str, image_size: int) -> MapTeacher:
    """Build the teacher, without loading weights. Raises UserError.

    model: as timm's create_model takes it.
    """
    _refuse_options(name, config)
    try:
        network: Any = timm.create_model(model, num_classes=0, **config.options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"teachers.{name}: timm cannot build {config.model}"
            f"{f' with {config.options}' if config.options else ''}: {one_line(error)}"
        ) from None
    strides = _strides(network)
    stride = config.stride or STRIDE
    if stride not in strides:
        raise UserError(
            f"teachers.{name}.stride = {stride}: {config.model} has feature maps of the strides "
            f"{', '.join(map(str, strides))}; choose one of them"
        )
    if image_size % stride:
        fits = [stride * (image_size // stride + more) for more in (0, 1)]
        raise UserError(
            f"teachers.{name}: image size {image_size} is not a multiple of the stride {stride} of {config.model}; "
            f"set teachers.{name}.image_size to {fits[0] or fits[1]} or {fits[1]}"
        )
    side = image_size // stride
    if config.grid is not None and config.grid > COARSEST * side:
        raise UserError(
            f"teachers.{name}.grid = {config.grid} is more than twice the {side}x{side} map of stride {stride} at "
            f"{image_size} px; set image_size to {stride * config.grid}, or choose a smaller stride"
        )
    teacher = MapTeacher(name, config, image_size, network, stride)
    if next(teacher.tower.parameters()).is_meta:
        _check_map(name, config, teacher, side)
    return teacher


def is_hierarchical(network: Any) -> bool:
    """Whether a network of timm has feature maps of several strides that it can hand out one by one."""
    parts = ("feature_info", "forward_intermediates", "prune_intermediate_layers")
    return all(hasattr(network, part) for part in parts) and len(set(_strides(network))) > 2


def _strides(network: Any) -> list[int]:
    return [int(level["reduction"]) for level in network.feature_info]


def _refuse_options(name: str, config: TeacherConfig) -> None:
    if config.precision in ("int8", "fp8"):
        raise UserError(
            f"teachers.{name}.precision = {config.precision}: {config.model} is a convolutional network, and only the "
            f"linear layers of transformers are quantised; use bf16"
        )
    if config.shard:
        raise UserError(f"teachers.{name}.shard = true: {config.model} has no blocks to split over ranks; remove shard")
    if config.activation is not None:
        raise UserError(f"teachers.{name}.activation is of transformers; remove it for {config.model}")
    if config.attention == "cls":
        raise UserError(
            f"teachers.{name}.attention = cls: {config.model} has no class token; use norm, or random masking"
        )


def _check_map(name: str, config: TeacherConfig, teacher: MapTeacher, side: int) -> None:
    """Refuse a network whose map is not what its description says. On the meta device, so without arithmetic."""
    size = teacher.info.image_size
    try:
        found = tuple(teacher.tower(torch.empty(1, 3, size, size, device="meta")).shape)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise UserError(f"teachers.{name}: {config.model} does not run at {size} px: {one_line(error)}") from None
    if found != (1, teacher.info.dim, side, side):
        raise UserError(
            f"teachers.{name}: {config.model} gives a map of shape {list(found[1:])} at {size} px, not "
            f"{[teacher.info.dim, side, side]}; take another model"
        )
