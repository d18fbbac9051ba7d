"""Small teachers with weights that matter: real library models, random but far from flat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mimscale.teachers.config import TeacherConfig
from mimscale.teachers.ensemble import TeacherEnsemble, build_skeleton, build_skeletons
from mimscale.types import TeacherInfo, TeacherNeeds

CPU = torch.device("cpu")
TIMM = {"embed_dim": 32, "depth": 3, "num_heads": 4}
OPEN_CLIP = {"width": 32, "layers": 3, "head_width": 8}
ALL = TeacherNeeds(levels=(0, 1, 2), cls_attention=True)


def shaken(make: Callable[[], Any], seed: int = 0) -> Any:
    """A module, the same at every call, with every weight moved off its initial value; in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def timm_model(name: str, size: int, **options: Any) -> Any:
    return shaken(lambda: timm.create_model(name, img_size=size, num_classes=0, **{**TIMM, **options}))


def open_clip_model(name: str, size: int, **options: Any) -> Any:
    """The whole CLIP, with a text tower of no consequence."""
    facts = open_clip.get_model_config(name)
    assert facts is not None
    vision = {**facts["vision_cfg"], **OPEN_CLIP, **options, "image_size": size}
    text = {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
    return shaken(lambda: open_clip.create_model(name, vision_cfg=vision, text_cfg=text))


def saved(module: nn.Module, path: Path) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in module.state_dict().items()}, path)
    return path


def timm_config(name: str, weights: Path | None, **changes: Any) -> TeacherConfig:
    values: dict[str, Any] = {
        "library": "timm",
        "model": name,
        "weights": weights,
        "precision": "fp32",
        "options": TIMM,
    }
    return TeacherConfig.model_validate({**values, **changes})


def open_clip_config(name: str, weights: Path | None, **changes: Any) -> TeacherConfig:
    values = {
        "library": "open_clip",
        "activation": "quickgelu" if "quickgelu" in name else "gelu",
        "options": OPEN_CLIP,
    }
    return timm_config(name, weights, **{**values, **changes})


def ensemble(
    config: TeacherConfig, size: int, needs: TeacherNeeds = ALL, device: torch.device = CPU
) -> TeacherEnsemble:
    """One teacher, named t."""
    return ensemble_of({"t": config}, {"t": needs}, size, device)


def ensemble_of(
    configs: Mapping[str, TeacherConfig],
    needs: Mapping[str, TeacherNeeds],
    size: int,
    device: torch.device = CPU,
) -> TeacherEnsemble:
    return TeacherEnsemble(configs, build_skeletons(configs, size), needs, size, device)


def describe(config: TeacherConfig, size: int) -> TeacherInfo:
    """What is known of a teacher named t without its weights."""
    return build_skeleton("t", config, size).info


def images(count: int, size: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
