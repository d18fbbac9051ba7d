"""Folders with config.json and one file of weights, as timm and Hugging Face transformers save a model.

Both are built as a timm model: transformers' ViTs differ from timm's in names and constants only. Nothing is downloaded
and no code in a folder is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
from timm.data.constants import (
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from timm.layers.activations import QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mimscale.convert.read import read
from mimscale.errors import UserError
from mimscale.teachers import huggingface
from mimscale.teachers.base import one_line
from mimscale.types import IMAGENET_MEAN, IMAGENET_STD

CONFIG, WEIGHTS = "config.json", ("model.safetensors", "pytorch_model.bin")


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


_VIT: dict[str, Any] = {"patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
_CLIP: dict[str, Any] = {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "num_channels": 3,
    "qkv_bias": True,
}
_FAMILIES = {
    "vit": _Family(_VIT, False, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    "vit_mae": _Family(_VIT, False, IMAGENET_MEAN, IMAGENET_STD),
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
    if kind in _FAMILIES:
        if image_size is not None:
            raise UserError(f"image_size = {image_size}: a transformers model keeps its own size; leave it out")
        return _transformers(folder, config, weights, _FAMILIES[kind])
    if kind is not None:
        raise UserError(
            f"{folder} holds a '{kind}' of transformers; {', '.join(sorted(_FAMILIES))} are read. Others: take timm's "
            "version of the model"
        )
    raise UserError(f"{folder / CONFIG} has neither 'architecture' (timm) nor 'model_type' (transformers)")


def _timm(folder: Path, config: Mapping[str, Any], weights: Path, image_size: int | None) -> Pretrained:
    facts = config.get("pretrained_cfg") or {k: v for k, v in config.items() if k not in _NOT_OF_THE_CARD}
    classes = {"num_classes": config["num_classes"]} if "num_classes" in config else {}
    options = {**config.get("model_args", {}), "num_classes": 0}
    if image_size is not None:  # not every architecture takes it
        options["img_size"] = image_size
    state = read(weights).weights
    card = {**{k: v for k, v in facts.items() if k not in _SOURCES}, **classes, "state_dict": state}
    try:
        model: Any = timm.create_model(config["architecture"], pretrained=True, pretrained_cfg=card, **options)
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
    return Pretrained(model, tuple(card["mean"]), tuple(card["std"]))


def _transformers(folder: Path, config: Mapping[str, Any], weights: Path, family: _Family) -> Pretrained:
    values = {**_DEFAULTS, **family.defaults, **(config.get("vision_config") or config)}
    if values["hidden_act"] not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise UserError(f"{folder}: hidden_act = {values['hidden_act']} is not known; {known} are")
    try:
        model = VisionTransformer(
            img_size=values["image_size"],
            patch_size=values["patch_size"],
            in_chans=values["num_channels"],
            num_classes=0,
            embed_dim=values["hidden_size"],
            depth=values["num_hidden_layers"],
            num_heads=values["num_attention_heads"],
            mlp_ratio=values["intermediate_size"] / values["hidden_size"],
            qkv_bias=values["qkv_bias"],
            pre_norm=family.pre_norm,
            norm_layer=partial(nn.LayerNorm, eps=values["layer_norm_eps"]),
            act_layer=_ACTIVATIONS[values["hidden_act"]],
        )
        state = huggingface.to_timm(read(weights).weights)
        if state is None:
            raise UserError(f"{weights} does not hold the tensors of a {config['model_type']}")
        model.load_state_dict(state)
    except KeyError as error:
        raise UserError(f"{weights}: the tensor {error} is missing") from None
    except (AssertionError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, UserError):
            raise
        text = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: {CONFIG} and {weights.name} do not fit together ({text})") from None
    return Pretrained(model, *_normalisation(folder / "preprocessor_config.json", family))


def _normalisation(path: Path, family: _Family) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of a transformers folder."""
    facts = _json(path) if path.is_file() else {}
    if facts.get("do_normalize") is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return tuple(facts.get("image_mean") or family.mean), tuple(facts.get("image_std") or family.std)


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON ({one_line(error)}); get it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, not a mapping; get it again")
    return values
