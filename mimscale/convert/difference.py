"""How two networks are compared: the same random input through both, and the largest difference of their outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimscale.errors import UserError

LIMIT = 1e-4  # of the largest output, in fp32: the two programs sum in different orders
HUB_LIMIT = 1e-5
"""Of the folders that transformers and timm load."""
INPUT = "standard normal numbers of torch.Generator().manual_seed(0), fp32 on the CPU"
Differences = dict[str, float]
"""Part of the network (encoder, decoder, ...) -> its `relative_difference`."""


def random_input(*shape: int) -> Tensor:
    """float32 standard normal numbers, always the same for a shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of `theirs`; NaN where either tensor holds a NaN."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def refuse_difference(found: Differences, out: Path, limit: float = LIMIT) -> None:
    """Raises UserError for a difference above the limit, or a NaN. out: the file that is then not written."""
    for name, value in found.items():
        if not value <= limit:
            raise UserError(
                f"{out} is not written: its {name} gives other numbers than the source, by {value:.1e} of the largest "
                f"(limit {limit:.0e}); the weights may not be finite, or the file is of another kind than its names say"
            )


def report(found: Differences, limit: float = LIMIT) -> dict[str, Any]:
    """The entries of a conversion's JSON report that say how the networks were compared."""
    return {"differences": found, "limit": limit, "of": "the largest absolute output", "input": INPUT}


def lines(found: Differences, limit: float = LIMIT) -> list[str]:
    """One line per compared part, for the terminal."""
    return [
        f"checked on random input: {name} differs by {value:.1e} of the largest output (limit {limit:.0e})"
        for name, value in found.items()
    ]
