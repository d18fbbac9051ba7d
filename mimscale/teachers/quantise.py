"""Teachers in 8 bits: int8 or fp8 (e4m3) weights and activations in the blocks' linear layers, with torchao.

Weights have one scale per output row, activations one per token, computed at run time. The rest stays in bf16: patch
embedding, norms, softmax, the residual stream, the last block's attention (the CLS attention is computed from it), and
linear layers with a side that is not a multiple of 16 (the MLPs of EVA02-L), for which GPUs have no 8-bit kernels.
open_clip's attention is one fused module, so only its MLPs (two thirds of the arithmetic) are quantised; timm has the
same models with separate layers.
"""

from __future__ import annotations

import logging
import warnings
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

from mimscale.errors import UserError
from mimscale.teachers.base import Teacher

FP8 = torch.float8_e4m3fn
FP8_CAPABILITY = (8, 9)
SIDE = 16  # both sides of a matrix must be multiples of this for the 8-bit kernels of GPUs


def is_quantised(precision: str) -> bool:
    return precision in ("int8", "fp8")


@cache
def unavailable() -> str:
    """Why torchao cannot be used here; empty if it can. torchao supports a range of torch versions."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of torch about torchao's own calls, which a user cannot change
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.quantization import Float8Tensor, Int8DynamicActivationInt8WeightConfig  # noqa: F401
    except Exception as error:  # a torchao for another torch version fails in many ways
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    finally:
        logging.disable(disabled)
    return ""


def check(name: str, precision: str, device: torch.device | None = None) -> None:
    """Refuse a precision that this machine, or this device, does not support. Raises UserError."""
    if not is_quantised(precision):
        return
    if unavailable():
        raise UserError(
            f"teachers.{name}.precision = {precision} needs a torchao for torch {torch.__version__} "
            f"({unavailable()}); pip install -e '.[fp8]', or use bf16"
        )
    on_gpu = device is not None and device.type == "cuda"
    if precision == "fp8" and on_gpu and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise UserError(
            f"teachers.{name}.precision = fp8, which {torch.cuda.get_device_name(device)} does not support "
            f"(compute capability 8.9 is needed); use int8 or bf16"
        )


@torch.no_grad()
def quantise(teacher: Teacher, precision: Literal["int8", "fp8"]) -> None:
    """Quantise the bf16 weights of the blocks' linear layers in place. Call `check` before."""
    for linear in linears(teacher):
        weight: Any = _int8(linear) if precision == "int8" else _fp8(linear.weight)
        linear.weight = nn.Parameter(weight, requires_grad=False)


def linears(teacher: Teacher) -> list[nn.Linear]:
    """The layers to quantise, in the order of the blocks."""
    kept = set(teacher.blocks[-1].get_submodule("attn").modules())
    candidates = [m for block in teacher.blocks for m in block.modules() if type(m) is nn.Linear and m not in kept]
    return [m for m in candidates if m.in_features % SIDE == m.out_features % SIDE == 0]


def _int8(linear: nn.Linear) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(linear, Int8DynamicActivationInt8WeightConfig())
    return linear.weight


def _fp8(weight: torch.Tensor) -> Any:
    """The tensor that torchao's configuration for dynamic fp8 makes. That configuration refuses CPUs, although torch's
    scaled matmul supports them.
    """
    from torchao.quantization import Float8MMConfig, Float8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    return Float8Tensor.from_hp(
        weight,
        float8_dtype=FP8,
        granularity=PerRow(),
        mm_config=Float8MMConfig(use_fast_accum=True),
        act_quant_kwargs=QuantizeTensorToFloat8Kwargs(float8_dtype=FP8, granularity=PerRow()),
    )
