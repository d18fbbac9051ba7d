"""Teachers from timm: the plain `VisionTransformer` (CLIP, DINO, DINOv2, SigLIP2) and `Eva` (DINOv3, EVA02, PE).

`Eva` rotates the queries and keys of the patches by their position in the grid (rotary position embedding).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import timm
import torch
from timm.layers import AttentionRope, PatchEmbed, apply_rot_embed_cat
from timm.models import eva
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Attention, Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from mimscale.errors import UserError
from mimscale.teachers import feature_maps, huggingface
from mimscale.teachers.base import Teacher, info_of, one_line, project
from mimscale.teachers.config import TeacherConfig
from mimscale.teachers.weights import TIMM_FILE, HubFile

_UNREAD = ("norm", "fc_norm", "attn_pool", "head")  # of the tower; targets are block outputs
_ACTIVATIONS = {"gelu": "gelu", "quickgelu": "quick_gelu"}
_CHOICES = "choose a CLIP, DINO, DINOv2, DINOv3, EVA02 or SigLIP2 model"


class TimmTeacher(Teacher):
    """A timm VisionTransformer, on the device of the surrounding `torch.device` context."""

    tower: Any  # VisionTransformer; timm does not annotate its attributes

    def __init__(self, name: str, config: TeacherConfig, image_size: int, tower: Any) -> None:
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
        return _read(named)


class RotaryTeacher(TimmTeacher):
    """A timm Eva: queries and keys of the patches are rotated in every block, those of prefix tokens are not.

    angles: sine and cosine per patch, float32 [L, 2d] whatever the precision; None for the first EVA, which has no
    rotary positions.
    """

    angles: Tensor | None

    def __init__(self, name: str, config: TeacherConfig, image_size: int, tower: Any) -> None:
        angles = None if tower.rope is None else _angles(name, config, image_size, tower.embed_dim // _heads(tower))
        tower.rope = None
        for block in tower.blocks:
            if getattr(block.attn, "k_bias", None) is not None:
                block.attn.register_buffer(
                    "k_bias", block.attn.k_bias
                )  # zeros; persistent, so that `load` fills it on meta
        super().__init__(name, config, image_size, tower)
        self.register_buffer("angles", angles, persistent=False)

    def run(self, block: nn.Module, tokens: Tensor) -> Tensor:
        out: Tensor = block(tokens, rope=self.angles)
        return out

    def query_and_keys(self, block: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
        attention: Any = block.attn
        normed = block.norm1(tokens)  # type: ignore[operator]
        if attention.qkv is None:
            weights = (attention.q_proj.weight, attention.k_proj.weight)
            biases = (attention.q_proj.bias, attention.k_proj.bias)
        else:
            weights = attention.qkv.weight.chunk(3)
            if isinstance(attention, EvaAttention):
                biases = (attention.q_bias, attention.k_bias)
            else:
                biases = attention.qkv.bias.chunk(3) if attention.qkv.bias is not None else (None, None)
        query = attention.q_norm(project(normed[:, :1], weights[0], biases[0], attention.num_heads))
        keys = attention.k_norm(project(normed, weights[1], biases[1], attention.num_heads))
        if self.angles is not None:  # the query is the class token's, a prefix token
            rotated = apply_rot_embed_cat(keys[:, :, self.prefix :], self.angles, half=attention.rotate_half)
            keys = torch.cat([keys[:, :, : self.prefix], rotated.to(keys.dtype)], dim=2)
        return query * attention.scale, keys

    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = _read(eva.checkpoint_filter_fn(dict(state), self.tower, antialias=False))
        zeros = {key: torch.zeros(b.shape) for key, b in self.tower.named_buffers() if key.endswith(".k_bias")}
        return {**named, **zeros}


def models() -> list[str]:
    """All model names of the library, including those that cannot be teachers."""
    return timm.list_models()


def build(name: str, config: TeacherConfig, image_size: int) -> Teacher:
    """Build the teacher, without loading weights. Raises UserError."""
    model, _ = _tagged(name, config)
    if _has_feature_maps(model):
        return feature_maps.build(name, config, model, image_size)
    tower = _tower(name, config, image_size)
    return (RotaryTeacher if type(tower) is Eva else TimmTeacher)(name, config, image_size, tower)


@lru_cache
def _has_feature_maps(model: str) -> bool:
    """Whether a model is a convolutional network with maps of several strides. It is built once, without memory."""
    with torch.device("meta"):
        try:
            network: Any = timm.create_model(model, num_classes=0)
        except (TypeError, ValueError, RuntimeError, AssertionError, NotImplementedError):
            return False
    return feature_maps.is_hierarchical(network) and not hasattr(network, "patch_embed")


def _read(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key.partition(".")[0] not in _UNREAD}


def _heads(tower: Any) -> int:
    heads: int = tower.blocks[0].attn.num_heads
    return heads


def _angles(name: str, config: TeacherConfig, image_size: int, head_dim: int) -> Tensor:
    """A model's table of rotary positions, taken from a model with one small block: it does not depend on weights.

    On the CPU also if the tower is on the meta device.
    """
    small = {**config.options, "embed_dim": head_dim, "num_heads": 1, "depth": 1}
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        tower = _tower(name, config.model_copy(update={"options": small}), image_size)
    angles: Tensor = tower.rope.get_embed()
    return angles.detach()


def hub_file(name: str, config: TeacherConfig) -> HubFile:
    """The file of timm's pretrained tag. Raises UserError if there is none."""
    model, tag = _tagged(name, config)
    if not tag:  # a model's default tag changes between versions of timm
        raise UserError(f"teachers.{name} has neither weights nor a tag; timm's tags for {model} are {_tags(model)}")
    facts = timm.get_pretrained_cfg(model)
    if facts is None or not facts.hf_hub_id:
        raise UserError(f"teachers.{name}: timm names no hub file for {config.model}; set teachers.{name}.weights")
    return HubFile.of(facts.hf_hub_id, facts.hf_hub_filename or TIMM_FILE)


def _tower(name: str, config: TeacherConfig, image_size: int) -> Any:
    model, tag = _tagged(name, config)
    _refuse_ambiguous_activation(name, config, tag)
    options = dict(config.options)
    if config.activation is not None:
        options["act_layer"] = _ACTIVATIONS[config.activation]
    try:
        tower: Any = timm.create_model(model, img_size=image_size, num_classes=0, dynamic_img_size=False, **options)
    except Exception as error:  # of whatever kind the library raises for options that it does not know
        raise UserError(
            f"teachers.{name}: timm cannot build {config.model} at {image_size} px as a plain vision transformer"
            f"{f' with {config.options}' if config.options else ''}: {one_line(error)}"
        ) from None
    if not (_is_plain(tower) or _is_rotary(tower)):
        raise UserError(
            f"teachers.{name}: {config.model} ({type(tower).__name__}) is not a plain pre-norm vision transformer "
            f"of timm; {_CHOICES}"
        )
    tower.norm, tower.fc_norm, tower.attn_pool, tower.head = nn.Identity(), nn.Identity(), None, nn.Identity()
    return tower


def _is_plain(tower: Any) -> bool:
    return (
        type(tower) is VisionTransformer
        and type(tower.patch_embed) is PatchEmbed
        and all(type(block) is Block and type(block.attn) is Attention for block in tower.blocks)
    )


def _is_rotary(tower: Any) -> bool:
    """timm's Eva with one table of angles for all blocks and as many key heads as query heads."""
    return (
        type(tower) is Eva
        and not tower.rope_mixed
        and all(type(block) is EvaBlock for block in tower.blocks)
        and all(type(block.attn) in (EvaAttention, AttentionRope) for block in tower.blocks)
        and all(getattr(block.attn, "num_kv_groups", 1) == 1 for block in tower.blocks)
    )


def _tagged(name: str, config: TeacherConfig) -> tuple[str, str]:
    """(model.tag, as timm's create_model takes it, and the tag). Raises UserError for an unknown model or tag."""
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
    """timm lists some CLIP weights for a model with GELU and one with QuickGELU; they were trained with QuickGELU."""
    model = config.model.partition(".")[0]
    twin = model.replace("_clip_", "_clip_quickgelu_")
    if config.activation is not None or "_quickgelu_" in model or twin == model or not tag:
        return
    if f"{twin}.{tag}" in timm.list_pretrained(f"{twin}.*"):
        raise UserError(
            f"teachers.{name}.model = '{config.model}' uses exact GELU, but these weights were trained with QuickGELU; "
            f"use {twin}.{tag} (or set activation: gelu to confirm GELU)"
        )
