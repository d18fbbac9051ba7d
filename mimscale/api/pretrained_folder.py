"""Folders with config.json and one file of weights, as timm and Hugging Face transformers save a model.

Both are built as a timm model: transformers' ViTs and BEiTs differ from timm's in names and constants only. Nothing is
downloaded and no code in a folder is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from timm.data.constants import (
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from timm.layers.activations import QuickGELU
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mimscale.config.base import numbers_in
from mimscale.convert.formats.timm import INDEX
from mimscale.convert.read import read
from mimscale.convert.saved_folder import CONFIG, WEIGHTS
from mimscale.errors import UserError
from mimscale.teachers import huggingface
from mimscale.teachers.base import one_line
from mimscale.types import IMAGENET_MEAN, IMAGENET_STD

MOST, MOST_BLOCKS = 8192, 512  # pixels, channels, heads; blocks: nobody has trained a larger one


class Pretrained(NamedTuple):
    """model: a timm model whose `forward_features` returns tokens [B, T, D]. mean, std: for pixels in 0..1."""

    model: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]


class _Family(NamedTuple):
    """What transformers leaves out of config.json and preprocessor_config.json: its defaults, and the normalisation."""

    defaults: Mapping[str, Any]
    pre_norm: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]


class _Sizes(BaseModel):
    """What is read of transformers' config.json; the defaults are those of its ViTs, BEiT and CLIP's vision tower."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")

    hidden_size: int = Field(768, ge=1, le=MOST)
    num_hidden_layers: int = Field(12, ge=1, le=MOST_BLOCKS)
    num_attention_heads: int = Field(12, ge=1, le=MOST)
    intermediate_size: int = Field(3072, ge=1, le=1 << 20)
    image_size: int = Field(224, ge=1, le=MOST)
    patch_size: int = Field(ge=1, le=MOST)
    num_channels: Literal[3] = 3
    qkv_bias: bool = True
    hidden_act: str
    layer_norm_eps: float = Field(ge=0, lt=1)
    use_absolute_position_embeddings: bool = False
    use_relative_position_bias: bool = False
    use_shared_relative_position_bias: bool = False
    layer_scale_init_value: float = Field(0.1, ge=0, le=1e3)

    @field_validator("image_size", "patch_size", mode="before")
    @classmethod
    def _of_a_square(cls, value: Any) -> Any:
        return value[0] if isinstance(value, list) and len(value) == 2 and value[0] == value[1] else value


_VIT: dict[str, Any] = {"patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
_CLIP: dict[str, Any] = {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_FAMILIES = {
    "vit": _Family(_VIT, False, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    "vit_mae": _Family(_VIT, False, IMAGENET_MEAN, IMAGENET_STD),
    "beit": _Family(_VIT, False, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    "clip": _Family(_CLIP, True, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "clip_vision_model": _Family(_CLIP, True, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
}
_SOURCES = (
    "source",
    "url",
    "file",
    "hf_hub_id",
    "hf_hub_filename",
    "custom_load",
)  # timm would read from there instead
_NOT_OF_THE_CARD = ("architecture", "num_features", "labels", "model_args")  # in timm's older config.json, of one level
_TANH_GELU = partial(nn.GELU, approximate="tanh")
_ACTIVATIONS: dict[str, Any] = {
    "gelu": nn.GELU,
    "gelu_new": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
}


def folder_of(path: Path) -> Path | None:
    """The folder of this kind that a path stands for: itself, or that of its file of weights; else None."""
    folder = path.parent if path.name in WEIGHTS else path
    ours = (folder / "config.yaml").exists() or (folder / "manifest.json").exists()
    return folder if (folder / CONFIG).is_file() and not ours else None


def load_folder(folder: Path, image_size: int | None = None) -> Pretrained:
    """The model in a timm or transformers folder, on the CPU in float32, without its classifier. Raises UserError.

    image_size: pixels per side, which timm resizes positions to; None: as saved. Not for transformers' folders.
    """
    config = _json(folder / CONFIG)
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise UserError(f"{folder} has {CONFIG}, but neither {' nor '.join(WEIGHTS)}; save the model in one file")
    kind = config.get("model_type")
    if "architecture" in config:
        return _timm(folder, config, weights, image_size)
    if isinstance(kind, str) and kind in _FAMILIES:
        if image_size is not None:
            raise UserError(f"image_size = {image_size}: a transformers model keeps its own size; leave it out")
        return _transformers(folder, config, weights, _FAMILIES[kind])
    if kind is not None:
        raise UserError(
            f"{folder} holds a {_shown(kind)} of transformers; {', '.join(sorted(_FAMILIES))} are read. Others: take "
            "timm's version of the model"
        )
    raise UserError(f"{folder / CONFIG} has neither 'architecture' (timm) nor 'model_type' (transformers)")


def _timm(folder: Path, config: Mapping[str, Any], weights: Path, image_size: int | None) -> Pretrained:
    facts = _mapping(folder, config, "pretrained_cfg") or {k: v for k, v in config.items() if k not in _NOT_OF_THE_CARD}
    options = {**_mapping(folder, config, "model_args"), "num_classes": 0}
    if not isinstance(config["architecture"], str):
        raise UserError(f"{folder / CONFIG}: architecture = {_shown(config['architecture'])} is not a name of timm's")
    for place, number in numbers_in(options):
        if abs(number) > (MOST_BLOCKS if place.split(".")[0] == "depth" else MOST):
            raise UserError(f"{folder / CONFIG}: model_args.{place} = {number:g} is no size of a model; get it again")
    classes = {"num_classes": config["num_classes"]} if "num_classes" in config else {}
    if image_size is not None:  # not every architecture takes it
        options["img_size"] = image_size
    state = read(weights).weights
    card = {**{k: v for k, v in facts.items() if k not in _SOURCES}, **classes, "state_dict": state}
    try:
        with torch.device("meta"):
            _refuse_larger(folder, timm.create_model(config["architecture"], pretrained=False, **options), state)
        model: Any = timm.create_model(config["architecture"], pretrained=True, pretrained_cfg=card, **options)
    except UserError:
        raise
    except Exception as error:  # of whatever kind the architecture raises for options that it does not know
        raise UserError(f"{folder}: timm cannot load it ({one_line(error)})") from None
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if not hasattr(model, "num_prefix_tokens") or grid is None:
        raise UserError(
            f"{folder} holds a {type(model).__name__}, which has no patch tokens; take a vision transformer"
        )
    if grid[0] != grid[1]:
        raise UserError(f"{folder} takes images of {grid[0]} x {grid[1]} patches; only square images are read")
    card = model.pretrained_cfg
    mean, std = (_of_channels(folder / CONFIG, name, card.get(name)) for name in ("mean", "std"))
    return Pretrained(model, mean, std)


def _transformers(folder: Path, config: Mapping[str, Any], weights: Path, family: _Family) -> Pretrained:
    given = _mapping(folder, config, "vision_config") or config
    try:
        sizes = _Sizes.model_validate(
            {**family.defaults, **{k: v for k, v in given.items() if k in _Sizes.model_fields}}
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{folder / CONFIG}: {'.'.join(map(str, first['loc']))} = {_shown(first['input'])}: "
            f"{first['msg'][0].lower()}{first['msg'][1:]}"
        ) from None
    if sizes.hidden_act not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise UserError(f"{folder}: hidden_act = {sizes.hidden_act[:80]} is not known; {known} are")
    beit = config["model_type"] == "beit"
    try:
        state = huggingface.to_timm(read(weights).weights)
        if state is None:
            raise UserError(f"{weights} does not hold the tensors of a {config['model_type']}")
        build = partial(_beit, sizes, "fc_norm.weight" in state) if beit else partial(_vit, sizes, family.pre_norm)
        with torch.device("meta"):
            _refuse_larger(folder, build(), state)
        model = build()
        indices = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(INDEX)}
        model.load_state_dict({**indices, **state})
    except KeyError as error:
        raise UserError(f"{weights}: the tensor {error} is missing") from None
    except (AssertionError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, UserError):
            raise
        text = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: {CONFIG} and {weights.name} do not fit together ({text})") from None
    return Pretrained(model, *_normalisation(folder / "preprocessor_config.json", family))


def _common(sizes: _Sizes) -> dict[str, Any]:
    """Arguments of both of timm's classes."""
    return {
        "img_size": sizes.image_size,
        "patch_size": sizes.patch_size,
        "in_chans": sizes.num_channels,
        "num_classes": 0,
        "embed_dim": sizes.hidden_size,
        "depth": sizes.num_hidden_layers,
        "num_heads": sizes.num_attention_heads,
        "mlp_ratio": sizes.intermediate_size / sizes.hidden_size,
        "norm_layer": partial(nn.LayerNorm, eps=sizes.layer_norm_eps),
    }


def _vit(sizes: _Sizes, pre_norm: bool) -> nn.Module:
    activation = _ACTIVATIONS[sizes.hidden_act]
    return VisionTransformer(**_common(sizes), qkv_bias=sizes.qkv_bias, pre_norm=pre_norm, act_layer=activation)


def _beit(sizes: _Sizes, mean: bool) -> nn.Module:
    """mean: only the mean of the patches is normalised."""
    if sizes.hidden_act != "gelu":
        raise ValueError(f"hidden_act = {sizes.hidden_act}: timm's Beit computes gelu only")
    return Beit(
        **_common(sizes),
        use_abs_pos_emb=sizes.use_absolute_position_embeddings,
        use_rel_pos_bias=sizes.use_relative_position_bias,
        use_shared_rel_pos_bias=sizes.use_shared_relative_position_bias,
        init_values=sizes.layer_scale_init_value or None,
        global_pool="avg" if mean else "token",
    )


def _refuse_larger(folder: Path, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise UserError before memory is taken for a model that the file of weights cannot fill. Positions may be
    resized.
    """
    described = sum(tensor.numel() for name, tensor in model.named_parameters() if "pos_embed" not in name)
    held = sum(tensor.numel() for tensor in state.values())
    if described > 2 * held:
        raise UserError(
            f"{folder}: {CONFIG} and the weights do not fit together: a model of {described:,} parameters, and "
            f"{held:,} numbers"
        )


def _normalisation(path: Path, family: _Family) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of a transformers folder."""
    facts = _json(path) if path.is_file() else {}
    if facts.get("do_normalize") is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean, std = facts.get("image_mean") or family.mean, facts.get("image_std") or family.std
    return _of_channels(path, "image_mean", mean), _of_channels(path, "image_std", std)


def _of_channels(path: Path, name: str, values: Any) -> tuple[float, ...]:
    """Three finite numbers, those of a standard deviation above 0. Raises UserError."""
    numbers = tuple(values) if isinstance(values, list | tuple) else ()
    whole = len(numbers) == 3 and all(type(number) in (int, float) and abs(number) < 1e6 for number in numbers)
    if not whole or ("std" in name and min(numbers) <= 0):
        raise UserError(f"{path}: {name} = {_shown(values)} is not a number for each of red, green and blue")
    return tuple(map(float, numbers))


def _mapping(folder: Path, config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section of config.json, empty where there is none. Raises UserError."""
    values = config.get(name)
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{folder / CONFIG}: {name} = {_shown(values)} is not a section; get the file again")
    return values or {}


def _shown(value: Any) -> str:
    return repr(value)[:80]


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({one_line(error)}); get it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, not a mapping; get it again")
    return values
