"""Teachers from open_clip: image towers that are instances of open_clip's VisionTransformer."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from open_clip.model import resize_pos_embed
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from mimscale.errors import UserError
from mimscale.teachers.base import Teacher, info_of, one_line, project
from mimscale.teachers.config import TeacherConfig
from mimscale.teachers.weights import OPEN_CLIP_FILE, HubFile

_UNREAD = ("ln_post", "proj", "attn_pool", "attn_pool_contrastive")  # of the tower; targets are block outputs
_NO_TEXT = {
    "context_length": 8,
    "vocab_size": 8,
    "width": 8,
    "heads": 1,
    "layers": 1,
}  # create_model always builds a text tower

_WORD = {True: "quickgelu", False: "gelu"}


class OpenClipTeacher(Teacher):
    """An open_clip image tower, on the device of the surrounding `torch.device` context."""

    tower: Any  # VisionTransformer

    def __init__(self, name: str, config: TeacherConfig, image_size: int) -> None:
        tower = _build(name, config, image_size)
        depth = len(tower.transformer.resblocks)
        info = info_of(name, config, image_size, tower.patch_size, tower.conv1.out_channels, depth, has_cls=True)
        facts = _tag(config)
        mean = config.mean or facts.get("mean") or open_clip.OPENAI_DATASET_MEAN
        std = config.std or facts.get("std") or open_clip.OPENAI_DATASET_STD
        super().__init__(tower, info, 1, mean, std, config.norm_eps)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.tower.transformer.resblocks)

    def embed(self, pixels: Tensor) -> Tensor:
        tower = self.tower
        patches = tower.conv1(pixels).flatten(2).transpose(1, 2)
        cls = tower.class_embedding.expand(len(pixels), 1, -1)
        return tower.ln_pre(torch.cat([cls, patches], dim=1) + tower.positional_embedding)

    def query_and_keys(self, block: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
        attention: Any = block.attn
        normed = block.ln_1(tokens)  # type: ignore[operator]
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        query = project(normed[:, :1], weights[0], biases[0], attention.num_heads)
        return query * attention.head_dim**-0.5, project(normed, weights[1], biases[1], attention.num_heads)

    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = dict(state)
        if "visual.class_embedding" not in named:  # a file of the image tower only
            named = {f"visual.{key}": tensor for key, tensor in named.items()}
        resize_pos_embed(named, SimpleNamespace(visual=self.tower), antialias=False)
        tower = {key.removeprefix("visual."): tensor for key, tensor in named.items() if key.startswith("visual.")}
        return {key: tensor for key, tensor in tower.items() if key.partition(".")[0] not in _UNREAD}


def models() -> list[str]:
    """All model names of the library, including those that cannot be teachers."""
    return open_clip.list_models()


def build(name: str, config: TeacherConfig, image_size: int) -> OpenClipTeacher:
    """Build the teacher, without loading weights. Raises UserError."""
    return OpenClipTeacher(name, config, image_size)


def hub_file(name: str, config: TeacherConfig) -> HubFile:
    """The file of open_clip's pretrained tag. Raises UserError if there is none."""
    if config.pretrained is None:
        raise UserError(
            f"teachers.{name} has neither weights nor pretrained; open_clip's tags for {config.model} are "
            f"{', '.join(open_clip.list_pretrained_tags_by_model(config.model)) or '(none)'}"
        )
    repo, _, filename = _tag(config).get("hf_hub", "").rpartition("/")
    if not repo:
        raise UserError(
            f"teachers.{name}: open_clip names no hub file for {config.pretrained}; set teachers.{name}.weights"
        )
    return HubFile.of(repo, filename or OPEN_CLIP_FILE)


def _tag(config: TeacherConfig) -> dict[str, Any]:
    """open_clip's configuration of the pretrained tag: hf_hub, mean, std, quick_gelu."""
    return open_clip.get_pretrained_cfg(config.model, config.pretrained) if config.pretrained else {}


def _build(name: str, config: TeacherConfig, image_size: int) -> Any:
    facts = open_clip.get_model_config(config.model) if config.model in open_clip.list_models() else None
    if facts is None:
        close = difflib.get_close_matches(config.model, open_clip.list_models(), n=1)
        raise UserError(
            f"teachers.{name}.model = '{config.model}' is unknown to open_clip"
            f"{f'; did you mean {close[0]}?' if close else ''}"
        )
    if "timm_model_name" in facts["vision_cfg"]:
        raise UserError(
            f"teachers.{name}: open_clip's {config.model} wraps a timm model; "
            f"use library: timm, model: {facts['vision_cfg']['timm_model_name']}"
        )
    if config.pretrained and not _tag(config):
        known = ", ".join(open_clip.list_pretrained_tags_by_model(config.model))
        raise UserError(
            f"teachers.{name}.pretrained = '{config.pretrained}' is unknown; choose one of {known or '(none)'}"
        )
    _check_activation(name, config, bool(facts.get("quick_gelu", False)))
    vision = {**facts["vision_cfg"], **config.options, "image_size": image_size}
    try:
        device = torch.empty(0).device  # meta for a skeleton: get_default_device of torch 2.6 does not see the context
        tower = open_clip.create_model(config.model, device=device, vision_cfg=vision, text_cfg=_NO_TEXT).visual
    except Exception as error:  # of whatever kind the library raises for options that it does not know
        raise UserError(
            f"teachers.{name}: open_clip cannot build {config.model} with {config.options}: {one_line(error)}"
        ) from None
    if type(tower) is not VisionTransformer or any(
        type(block) is not ResidualAttentionBlock for block in tower.transformer.resblocks
    ):
        raise UserError(
            f"teachers.{name}: the image tower of {config.model} ({type(tower).__name__}) is not open_clip's plain "
            f"VisionTransformer; choose a ViT-* model"
        )
    for block in tower.transformer.resblocks:
        block.attn.batch_first = True  # open_clip before 2.25 uses [N, B, D] inside
    tower.ln_post, tower.attn_pool, tower.attn_pool_contrastive = nn.Identity(), None, None
    del tower.proj
    return tower


def _check_activation(name: str, config: TeacherConfig, quick: bool) -> None:
    """Refuse an unknown or wrong activation: a file does not record it, and the wrong one gives no error. Raises
    UserError.
    """
    if config.random:
        return
    tagged = bool(_tag(config).get("quick_gelu", config.pretrained == "openai")) if config.pretrained else None
    stated = config.activation == "quickgelu" if config.activation is not None else None
    if tagged is None and stated is None:
        raise UserError(
            f"teachers.{name}.activation is missing: a local open_clip file does not record it; set quickgelu for "
            f"OpenAI's weights, gelu for most others"
        )
    if tagged is not None and stated is not None and tagged != stated:
        raise UserError(
            f"teachers.{name}.activation = {config.activation}, but pretrained = {config.pretrained} was trained with "
            f"{_WORD[tagged]}; leave activation out"
        )
    trained = bool(stated if tagged is None else tagged)
    if trained != quick:
        other = config.model.replace("-quickgelu", "") if quick else f"{config.model}-quickgelu"
        raise UserError(
            f"teachers.{name}: the weights were trained with {_WORD[trained]}, but {config.model} computes "
            f"{_WORD[quick]}; use model: {other}"
        )
