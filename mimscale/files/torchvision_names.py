"""torchvision's names of a ViT (`vit_b_16` and others, also in programs that build on them) -> timm's.

The networks are the same: torchvision, too, keeps queries, keys and values in one matrix, and its norms have eps 1e-6.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

ANCHOR = "encoder.pos_embedding"
"""A tensor that no other ViT has under this name."""

_WHOLE = (
    ("class_token", "cls_token"),
    (ANCHOR, "pos_embed"),
    ("conv_proj.", "patch_embed.proj."),
    ("encoder.ln.", "norm."),
    ("heads.head.", "head."),
)
_BLOCK = re.compile(r"^encoder\.layers\.encoder_layer_(\d+)\.")
_OF_A_BLOCK = (
    ("ln_1.", "norm1."),
    ("ln_2.", "norm2."),
    ("self_attention.in_proj_", "attn.qkv."),
    ("self_attention.out_proj.", "attn.proj."),
    ("mlp.0.", "mlp.fc1."),
    ("mlp.3.", "mlp.fc2."),
    ("mlp.linear_1.", "mlp.fc1."),  # as the files of the first release have it
    ("mlp.linear_2.", "mlp.fc2."),
)


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under timm's names; names that torchvision's ViT does not have are left as they are."""
    return {_renamed(name): tensor for name, tensor in state.items()}


def _renamed(name: str) -> str:
    block = _BLOCK.match(name)
    if block:
        return f"blocks.{block[1]}.{_replaced(name[block.end() :], _OF_A_BLOCK)}"
    return _replaced(name, _WHOLE)


def _replaced(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    """With the first start (old, new) that fits replaced."""
    return next((new + name.removeprefix(old) for old, new in pairs if name.startswith(old)), name)
