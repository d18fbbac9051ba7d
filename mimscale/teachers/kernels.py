"""Parts of a teacher in fewer kernels than its library takes: CLIP's activation, open_clip's attention.

The fast path `teacher_kernels`. Numbers are equal up to rounding, names in the state dict are the library's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Factors = Mapping[str, float]

QUICK = 1.702  # of QuickGELU: x sigmoid(1.702 x)


class Fused(NamedTuple):
    """factors: of `fold_quickgelu`. changes: what was replaced, in words; empty if nothing was."""

    factors: Factors
    changes: str


def fuse(tower: nn.Module) -> Fused:
    """Apply both to a library's module."""
    attentions, factors = use_sdpa(tower), fold_quickgelu(tower)
    layers = len([name for name in factors if name.endswith(".weight")]) // 2
    parts = {f"QuickGELU in {layers} MLPs": layers, f"SDPA in {attentions} attentions": attentions}
    return Fused(factors, ", ".join(text for text, count in parts.items() if count))


def fold_quickgelu(tower: nn.Module) -> Factors:
    """Replace QuickGELU between two linear layers by SiLU. Returns the factor by which each parameter of these layers
    must be multiplied, by its name: x sigmoid(a x) = silu(a x) / a, so the layer before takes a and the one after 1/a.

    One kernel where the libraries take three, in every precision and on every device. The factors are to be applied
    before weights are cast to 16 bit, so that they are rounded once. In fp16 a x overflows above 38,000, where the
    library's does not; CLIP's activations are far below.
    """
    factors: dict[str, float] = {}
    for name, parent in tower.named_modules():
        for act, child in parent.named_children():
            layers = _around(parent, child)
            if layers is not None:
                setattr(parent, act, nn.SiLU())
                before, after = layers
                scaled = {
                    f"{name}.{before}.{kind}": QUICK for kind, _ in parent.get_submodule(before).named_parameters()
                }
                factors |= {**scaled, f"{name}.{after}.weight": 1 / QUICK}
    return factors


def _around(parent: nn.Module, child: nn.Module) -> tuple[str, str] | None:
    """The linear layers before and after a QuickGELU in an MLP without anything else; None otherwise."""
    if type(child).__name__ != "QuickGELU":
        return None
    rest = {name: module for name, module in parent.named_children() if module is not child}
    linears = tuple(name for name, module in rest.items() if isinstance(module, nn.Linear))
    others = [module for name, module in rest.items() if name not in linears]
    if len(linears) != 2 or any(not isinstance(module, nn.Identity | nn.Dropout) for module in others):
        return None
    return linears[0], linears[1]


class SelfAttention(nn.Module):
    """What nn.MultiheadAttention computes of one batch-first input without weights and masks, by SDPA.

    PyTorch's own kernel for evaluation makes a [B, H, N, N] tensor on a CPU, its path for training copies queries, keys
    and values.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = attention.out_proj

    def forward(self, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """[B, N, D] -> ([B, N, D], None). The other arguments of nn.MultiheadAttention are not read."""
        qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None


def use_sdpa(tower: nn.Module) -> int:
    """Replace nn.MultiheadAttention by `SelfAttention`, which keeps its parameters. Returns how many."""
    found = list(_attentions(tower))
    for parent, name, module in found:
        setattr(parent, name, SelfAttention(module))
    return len(found)


def _attentions(tower: nn.Module) -> Iterator[tuple[nn.Module, str, nn.MultiheadAttention]]:
    for parent in tower.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.MultiheadAttention) and child.batch_first and child.in_proj_bias is not None:
                yield parent, name, child


@torch.no_grad()
def scale_parameters(tower: nn.Module, factors: Factors) -> None:
    """Multiply parameters in place, for a tower that has its weights."""
    for name, factor in factors.items():
        tower.get_parameter(name).mul_(factor)
