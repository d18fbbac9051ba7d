"""The student's block linears in fp8: of the three products of a linear layer, forward and input gradient in e4m3.

torchao's recipe `rowwise_with_gw_hp`: one dynamic scale per row of activations, output gradients and, forward, weight
(backward: one for the whole weight). The weight's gradient stays in bf16, and so do norms, attention, the residual
stream, embeddings, heads and losses. Parameters, their names and the optimiser are those of bf16: a checkpoint goes on
with or without it. On a CPU the products are emulated: rounded to fp8, then multiplied in bf16.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mimscale.errors import UserError
from mimscale.models.vit import Residual
from mimscale.teachers.quantise import FP8_CAPABILITY, SIDE, unavailable


def check(device: torch.device, stage: int, precision: str) -> None:
    """Refuse fp8 where machine, stage or precision have none. Raises UserError."""
    if precision != "bf16":
        raise UserError(
            f"engine.student_fp8 = true with engine.ds_config in {precision}: fp8 products have bf16 results; name a "
            f"bf16 file, or set it to false"
        )
    if stage == 3:
        raise UserError(
            "engine.student_fp8 = true with ZeRO-3: the backward pass would keep every gathered weight; name a ZeRO-2 "
            "file as engine.ds_config, or set it to false"
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise UserError(
            f"engine.student_fp8 = true, which {torch.cuda.get_device_name(device)} does not support (compute "
            f"capability 8.9 is needed); set it to false"
        )
    if unavailable():  # last, because the import takes seconds
        raise UserError(
            f"engine.student_fp8 = true needs a torchao for torch {torch.__version__} ({unavailable()}); "
            f"pip install -e '.[fp8]', or set it to false"
        )


def use_fp8(method: nn.Module, device: torch.device) -> str:
    """Compute the linear layers of a method's blocks in fp8, if both sides are multiples of 16. Returns what was done.

    The layers stay where they are, with their weights; only their class changes.
    """
    layers = [
        layer
        for block in method.modules()
        if isinstance(block, Residual)
        for layer in block.modules()
        if isinstance(layer, nn.Linear)
    ]
    fitting = [layer for layer in layers if layer.in_features % SIDE == layer.out_features % SIDE == 0]
    for layer in fitting:
        kind: Any = type(layer)
        layer.__class__ = _fp8_class(kind, device.type == "cpu")
    how = "emulated on a CPU" if device.type == "cpu" else "torchao, dynamic per-row scales"
    return f"student_fp8: {len(fitting)} of {len(layers)} linear layers of the blocks ({how})"


@cache
def _fp8_class(layer_class: type[nn.Linear], emulate: bool) -> type[nn.Linear]:
    """A subclass of a linear layer's class that multiplies in fp8."""
    config, products = _recipe(emulate)

    def forward(self: nn.Linear, input: Tensor, bias: Tensor | None = None) -> Tensor:
        """As the layer's own: where its class takes the bias as an argument, it has none itself."""
        return fp8_linear(input, self.weight, self.bias if bias is None else bias, products, config)

    return type(f"Fp8{layer_class.__name__}", (layer_class,), {"forward": forward})


def fp8_linear(input: Tensor, weight: Tensor, bias: Tensor | None, products: Any, config: Any) -> Tensor:
    """[..., I] x [O, I] -> [..., O] in bf16. products, config: torchao's."""
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

    out: Tensor = matmul_with_hp_or_float8_args.apply(
        input.to(torch.bfloat16), weight.to(torch.bfloat16).t(), products, config
    )
    return out if bias is None else out + bias.to(out.dtype)


@cache
def _recipe(emulate: bool) -> tuple[Any, Any]:
    """torchao's configuration of the layer and of its three products."""
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    config = dataclasses.replace(Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp"), emulate=emulate)
    return config, Float8Linear(SIDE, SIDE, device="meta", config=config).linear_mm_config
