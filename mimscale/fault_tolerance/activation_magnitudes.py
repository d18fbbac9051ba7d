"""Which layer's activations grew: the largest magnitude of every module's output, now against then."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def magnitudes(module: nn.Module, forward: Callable[[], Any]) -> dict[str, float]:
    """Module name -> largest |output| in one forward pass, in the order of execution; may be NaN or inf."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [t for t in (output if isinstance(output, (tuple, list)) else [output]) if isinstance(t, Tensor)]
            sizes = [t.detach().abs().amax().float() for t in tensors if t.is_floating_point() and t.numel()]
            if sizes:
                found[name] = torch.stack(sizes).amax()

        return hook

    with ExitStack() as stack:
        for name, child in module.named_modules():
            if name:
                stack.callback(child.register_forward_hook(keep(name)).remove)
        forward()
    values = torch.stack(list(found.values())).tolist() if found else []
    return dict(zip(found, values, strict=True))


def largest(of_ranks: list[dict[str, float]]) -> dict[str, float]:
    """Rank by rank the worst; what is not finite is worse than any number."""
    return {name: max((m[name] for m in of_ranks), key=_badness) for name in of_ranks[0]}


def suspect(now: Mapping[str, float], before: Mapping[str, float]) -> str:
    """One phrase that names the suspect layer: the first that is not finite, else the one that grew the most."""
    broken = next((name for name, value in now.items() if not math.isfinite(value)), None)
    if broken is not None:
        return f"{broken} is the first layer whose output is not finite"
    growth = {name: value / before[name] for name, value in now.items() if before.get(name)}
    if not growth:
        name = max(now, key=lambda name: now[name])
        return f"{name} has the largest output, {now[name]:.3g}"
    name = max(growth, key=lambda name: growth[name])
    return f"{name} grew the most, {before[name]:.3g} -> {now[name]:.3g}"


def _badness(value: float) -> float:
    return math.inf if math.isnan(value) else abs(value)
