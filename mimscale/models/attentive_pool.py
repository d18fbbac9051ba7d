"""Poolings of a frozen network's patch tokens that are trained with a probe: [B, T, D] -> [B, D]."""

from __future__ import annotations

from typing import Literal

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

Kind = Literal["efficient", "latent"]


class EfficientPool(nn.Module):
    """Multi-query attention without projections of queries and keys (Psomas et al., arXiv 2506.10178).

    A = softmax(Q X^T / sqrt(D)) with M learned queries; V = X W, whose D columns are cut into M blocks; the result is
    the concatenation of A_m V_m. It is computed as (A_m X) W_m, the same product in an order that costs D / M of it.
    X is the output of the encoder's last LayerNorm.
    """

    def __init__(self, width: int, queries: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, queries, width) * 0.02)
        self.value = nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        queries, width = self.queries.shape[1:]
        attention_BMT = (self.queries * width**-0.5 @ x_BTD.transpose(1, 2)).softmax(dim=-1)
        weight_MdD = self.value.weight.view(queries, -1, width)
        return torch.einsum("bmw,mdw->bmd", attention_BMT @ x_BTD, weight_MdD).flatten(1)


def attentive_pool(kind: Kind, width: int, most: int) -> tuple[nn.Module, int]:
    """A pooling and its number of queries (efficient) or heads (latent): the most up to `most` that divide `width`."""
    number = max(n for n in range(1, min(most, width) + 1) if width % n == 0)
    if kind == "efficient":
        return EfficientPool(width, number), number
    return AttentionPoolLatent(width, num_heads=number, mlp_ratio=4.0), number
