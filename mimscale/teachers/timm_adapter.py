"""Teachers from timm: every model whose class is the plain `VisionTransformer` (CLIP, DINO, DINOv2, SigLIP, ...)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Attention, Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from mimscale.config import TeacherConfig
from mimscale.errors import UserError
from mimscale.teachers import huggingface
from mimscale.teachers.base import Teacher, info_of, one_line, project
from mimscale.teachers.weights import TIMM_FILE, HubFile

_UNREAD = ("norm", "fc_norm", "attn_pool", "head")  # of the tower; targets are the raw residual stream
_ACTIVATIONS = {"gelu": "gelu", "quickgelu": "quick_gelu"}


class TimmTeacher(Teacher):
    """A timm VisionTransformer. Its parameters are where the surrounding `torch.device` puts them."""

    tower: Any  # VisionTransformer, whose attributes timm does not annotate

    def __init__(self, name: str, config: TeacherConfig, image_size: int) -> None:
        tower = _build(name, config, image_size)
        patch = tower.patch_embed.patch_size
        info = info_of(name, config, image_size, patch, tower.embed_dim, len(tower.blocks), tower.cls_token is not None)
        mean, std = config.mean or tower.pretrained_cfg["mean"], config.std or tower.pretrained_cfg["std"]
        super().__init__(tower, info, tower.num_prefix_tokens, mean, std, config.norm_eps)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.tower.blocks)

    def embed(self, pixels: Tensor) -> Tensor:
        tower = self.tower
        patches = tower.patch_embed(pixels)
        prefix = [t.expand(len(pixels), -1, -1) for t in (tower.cls_token, tower.reg_token) if t is not None]
        if tower.pos_embed is None:
            tokens = torch.cat([*prefix, patches], dim=1)
        elif tower.no_embed_class:
            tokens = torch.cat([*prefix, patches + tower.pos_embed], dim=1)
        else:
            tokens = torch.cat([*prefix, patches], dim=1) + tower.pos_embed
        return tower.norm_pre(tokens)

    def query_and_keys(self, block: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
        attention: Any = block.attn
        normed = block.norm1(tokens)  # type: ignore[operator]
        weights = attention.qkv.weight.chunk(3)
        biases = attention.qkv.bias.chunk(3) if attention.qkv.bias is not None else (None, None)
        query = attention.q_norm(project(normed[:, :1], weights[0], biases[0], attention.num_heads))
        keys = attention.k_norm(project(normed, weights[1], biases[1], attention.num_heads))
        return query * attention.scale, keys

    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = checkpoint_filter_fn(huggingface.to_timm(state) or dict(state), self.tower, antialias=False)
        return {key: tensor for key, tensor in named.items() if key.partition(".")[0] not in _UNREAD}


def hub_file(name: str, config: TeacherConfig) -> HubFile:
    """The file that timm's tag stands for. Raises UserError where there is none."""
    model, tag = _tagged(name, config)
    if not tag:  # timm's default tag of a model changes between its versions
        raise UserError(f"teachers.{name} has neither weights nor a tag; timm's tags for {model} are {_tags(model)}")
    facts = timm.get_pretrained_cfg(model)
    if facts is None or not facts.hf_hub_id:
        raise UserError(f"teachers.{name}: timm names no hub file for {config.model}; set teachers.{name}.weights")
    return HubFile.of(facts.hf_hub_id, facts.hf_hub_filename or TIMM_FILE)


def _build(name: str, config: TeacherConfig, image_size: int) -> Any:
    model, tag = _tagged(name, config)
    _refuse_ambiguous_activation(name, config, tag)
    options = dict(config.options)
    if config.activation is not None:
        options["act_layer"] = _ACTIVATIONS[config.activation]
    try:
        tower: Any = timm.create_model(model, img_size=image_size, num_classes=0, dynamic_img_size=False, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"teachers.{name}: timm cannot build {config.model} at {image_size} px as a plain vision transformer"
            f"{f' with {config.options}' if config.options else ''}: {one_line(error)}"
        ) from None
    if type(tower).__name__ == "Eva":
        raise UserError(
            f"teachers.{name}: {config.model} has rotary positions (timm's class Eva: DINOv3, EVA02, PE), which are "
            f"not supported; choose a CLIP, DINO, DINOv2 or SigLIP model"
        )
    plain = type(tower) is VisionTransformer and type(tower.patch_embed) is PatchEmbed
    if not plain or any(type(b) is not Block or type(b.attn) is not Attention for b in tower.blocks):
        raise UserError(
            f"teachers.{name}: {config.model} ({type(tower).__name__}) is not a plain pre-norm VisionTransformer "
            f"of timm; choose a CLIP, DINO, DINOv2 or SigLIP model"
        )
    tower.norm, tower.fc_norm, tower.attn_pool, tower.head = nn.Identity(), nn.Identity(), None, nn.Identity()
    return tower


def _tagged(name: str, config: TeacherConfig) -> tuple[str, str]:
    """(model.tag as timm wants it, tag). Raises UserError for a model or tag that timm does not know."""
    model, _, tag = config.model.partition(".")
    tag = config.pretrained or tag
    if not timm.is_model(model):
        close = difflib.get_close_matches(model, timm.list_models(), n=1)
        raise UserError(
            f"teachers.{name}.model = '{config.model}' is unknown to timm {timm.__version__}"
            f"{f'; did you mean {close[0]}?' if close else ''}"
        )
    if tag and f"{model}.{tag}" not in timm.list_pretrained(f"{model}.*"):
        raise UserError(f"teachers.{name}: timm has no tag '{tag}' for {model}; choose one of {_tags(model)}")
    return (f"{model}.{tag}" if tag else model), tag


def _tags(model: str) -> str:
    return ", ".join(entry.partition(".")[2] for entry in timm.list_pretrained(f"{model}.*")) or "(none)"


def _refuse_ambiguous_activation(name: str, config: TeacherConfig, tag: str) -> None:
    """timm lists some CLIP weights under two models, exact GELU and QuickGELU; they were trained with one of them."""
    model = config.model.partition(".")[0]
    twin = model.replace("_clip_", "_clip_quickgelu_")
    if config.activation is not None or "_quickgelu_" in model or twin == model or not tag:
        return
    if f"{twin}.{tag}" in timm.list_pretrained(f"{twin}.*"):
        raise UserError(
            f"teachers.{name}.model = '{config.model}' uses exact GELU, but these weights were trained with QuickGELU; "
            f"use {twin}.{tag} (or say activation: gelu if you mean it)"
        )
