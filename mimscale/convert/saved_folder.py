"""Folders with config.json and one file of weights, as transformers and timm save a model: what tensors do not show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mimscale.errors import UserError, warn
from mimscale.models.vit import LN_EPS

CONFIG, WEIGHTS = "config.json", ("model.safetensors", "pytorch_model.bin")
EXACT_GELU = "gelu"
TRANSFORMERS = ("vit", "vit_mae", "beit")
"""Values of `model_type` whose networks are students, if their constants are."""


def weights_in(folder: Path) -> Path | None:
    """The file of weights of such a folder, None where it is none. Raises UserError for weights in several files."""
    if not (folder / CONFIG).is_file():
        return None
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None and any(folder.glob("*.index.json")):
        raise UserError(f"{folder} holds its weights in several files; save the model in one {WEIGHTS[0]}")
    return found


def heads_beside(file: Path) -> int | None:
    """Attention heads that config.json states beside a file of weights, None where there is none or it does not say.

    Raises UserError for a config.json that cannot be read, and for a network that computes otherwise than a student.
    """
    path = file.parent / CONFIG
    if file.name not in WEIGHTS or not path.is_file():
        return None
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
        if "architecture" in config:
            heads = (config.get("model_args") or {}).get("num_heads")
        elif config.get("model_type") in TRANSFORMERS:
            heads = config.get("num_attention_heads", 12)
            activation = config.get("hidden_act", EXACT_GELU)
            if activation != EXACT_GELU:
                raise UserError(f"{path}: hidden_act = {str(activation)[:40]}; students compute {EXACT_GELU} only")
            eps = config.get("layer_norm_eps", 1e-12)
            if eps != LN_EPS:
                warn(f"{path}: layer_norm_eps = {str(eps)[:40]}; students compute with {LN_EPS:g}, as MAE was trained")
        else:
            return None
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no configuration of a model ({type(error).__name__}); get it again") from None
    return heads if isinstance(heads, int) and not isinstance(heads, bool) else None
