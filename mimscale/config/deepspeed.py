"""The DeepSpeed JSON files of `ds_configs/`: they own the ZeRO stage, the precision and the communication.

The recipe owns everything else; a key that stands where it does not belong is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from mimscale.config.deepspeed_file import DeepSpeedFile
from mimscale.config.registry import first_line
from mimscale.errors import UserError, nearest
from mimscale.files.regular import read_regular

PRECISIONS: tuple[Literal["fp16", "bf16"], ...] = ("fp16", "bf16")
DS_REFUSED = (
    ("bf16", "check_grad_overflow"),
    ("bf16", "bf16_master_weights_and_grads"),
    ("bf16", "bf16_optimizer_states"),
    ("zero_optimization", "compute_grad_norm"),
    ("zero_optimization", "offload_optimizer"),
    ("zero_optimization", "offload_param"),
)
RECIPE_OWNS = {
    "train_batch_size": "schedule.global_batch",
    "train_micro_batch_size_per_gpu": "engine.max_micro_batch",
    "gradient_accumulation_steps": "engine.max_micro_batch",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "zero_allow_untested_optimizer": "optim.name",
    "scheduler": "schedule",
    "activation_checkpointing": "engine.activation_checkpointing",
    "steps_per_print": "log.every",
    "checkpoint": "checkpoint",
    "tensorboard": "log.trackers",
    "wandb": "log.trackers",
}


def ds_config_names() -> list[str]:
    files = (entry.name for entry in resources.files("ds_configs").iterdir())
    return sorted(f[:-5] for f in files if f.endswith(".json"))


def load_ds_config(name: str) -> dict[str, Any]:
    """The JSON that `engine.ds_config` names, with its ownership checked. Raises UserError."""
    path = Path(name)
    if path.suffix == ".json":
        try:
            text = read_regular(path).decode("utf-8")
        except OSError as error:
            raise UserError(f"engine.ds_config = '{name}' cannot be read: {error.strerror}") from None
        except ValueError:  # not UTF-8, or a path with a null byte
            raise UserError(f"engine.ds_config = '{name}' is not a text file in UTF-8; save it in UTF-8") from None
    elif name in ds_config_names():
        text = resources.files("ds_configs").joinpath(f"{name}.json").read_text()
    else:
        raise UserError(f"engine.ds_config = '{name}' is unknown{nearest(name, ds_config_names())}")
    try:
        values = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"engine.ds_config = '{name}' is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"engine.ds_config = '{name}' must be {{...}} with sections, found {type(values).__name__}")
    for key in values:
        if key in RECIPE_OWNS:
            raise UserError(f"{name}: '{key}' is owned by the recipe; remove it there and set {RECIPE_OWNS[key]}")
        if key not in DeepSpeedFile.model_fields:
            raise UserError(f"{name}: unknown top-level key '{key}'{nearest(key, sorted(DeepSpeedFile.model_fields))}")
    try:
        DeepSpeedFile.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{name}: {first_line(error, DeepSpeedFile, ())}") from None
    both = [precision for precision in PRECISIONS if values.get(precision, {}).get("enabled")]
    if len(both) > 1:
        raise UserError(f"{name}: {' and '.join(both)} are both enabled; enable one")
    zero = values.get("zero_optimization", {})
    if zero.get("stage", 0) == 0 and precision_of(values) != "fp32":
        raise UserError(f"{name}: ZeRO stage 0 in 16 bit drifts from the other stages; set zero_optimization.stage = 2")
    sums = values.get("data_types", {}).get("grad_accum_dtype")
    if zero.get("stage", 0) == 1 and precision_of(values) == "bf16" and sums not in (None, "bf16", "bfloat16"):
        raise UserError(
            f"{name}: in bf16 with data_types.grad_accum_dtype = {sums} DeepSpeed's optimizer for ZeRO stage 1 lets "
            f"bad gradients through; remove that key, or set zero_optimization.stage = 2"
        )
    for section, key in DS_REFUSED:
        if key in values.get(section, {}):
            raise UserError(f"{name}: {section}.{key} would switch off a check or move state that checkpoints need")
    if zero.get("round_robin_gradients"):
        raise UserError(f"{name}: zero_optimization.round_robin_gradients breaks checkpoints; remove it")
    if zero.get("stage", 0) == 3 and zero.get("memory_efficient_linear", True):
        raise UserError(f"{name}: zero_optimization.memory_efficient_linear changes every later matmul; set it false")
    return values


def precision_of(ds_config: Mapping[str, Any]) -> Literal["fp32", "bf16", "fp16"]:
    """Which number format a DeepSpeed config trains in."""
    for name in PRECISIONS:
        if ds_config.get(name, {}).get("enabled"):
            return name
    return "fp32"


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f"the key '{twice}' is given twice; remove one")
    return values
