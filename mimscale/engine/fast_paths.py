"""Which fast paths of the engine run and why, and the keys of DeepSpeed's configuration that follow from the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mimscale.engine.config import EngineConfig, FastPath


@dataclass(frozen=True)
class FastPaths:
    """plain: why each of the engine's fast paths gives way to its plain twin; empty where the fast path runs."""

    plain: Mapping[FastPath, str]

    def __contains__(self, path: object) -> bool:
        return any(path == name and not why for name, why in self.plain.items())

    def line(self, before: int, now: int) -> str:
        """For the first lines of a run. before, now: number of parameters of the method, and of the engine."""
        counted = {"flat_parameters": f"flat_parameters ({now} instead of {before} parameters)"}
        fast = ", ".join(counted.get(path, path) for path, why in self.plain.items() if not why)
        slow = ", ".join(f"{path} ({why})" for path, why in self.plain.items() if why)
        return f"fast paths: {fast or 'none'}" + (f"; plain: {slow}" if slow else "")


def choose(engine: EngineConfig) -> FastPaths:
    """The fast paths of an engine that a recipe admits and its backend has."""
    plain: dict[FastPath, str] = {"flat_parameters": "", "norm_check": "", "fused_update": ""}
    if engine.backend == "torch":
        plain["flat_parameters"] = "plain PyTorch has no cost per parameter"
    for path in plain:
        if not engine.uses(path):
            plain[path] = "engine.plain"
    return FastPaths(plain)


def fitted(zero_optimization: Mapping[str, Any], blocks: Sequence[Sequence[int]]) -> dict[str, Any]:
    """DeepSpeed's section `zero_optimization` with its sizes raised to what flat parameters need.

    blocks: of each repeated block the number of elements of its flat parameters. Sizes that a file gives are lower
    bounds: a bucket takes the largest flat parameter, or it would be reduced on its own; ZeRO-3 fetches a whole block
    ahead, and keeps each block's smallest parameter (norms and biases) on every rank, as it kept its parts before.
    """
    values = dict(zero_optimization)
    flat = [sizes for sizes in blocks if sizes]
    if not flat or not values.get("stage"):
        return values
    needed = {"reduce_bucket_size": max(max(sizes) for sizes in flat)}
    if values["stage"] == 3:
        needed["stage3_prefetch_bucket_size"] = max(sum(sizes) for sizes in flat)
        smallest = [min(sizes) for sizes in flat if len(sizes) > 1]
        needed["stage3_param_persistence_threshold"] = max(smallest, default=0) + 1
    defaults = {"reduce_bucket_size": 500_000_000, "stage3_prefetch_bucket_size": 50_000_000}
    for key, least in needed.items():
        values[key] = max(int(values.get(key, defaults.get(key, 100_000))), least)
    return values
