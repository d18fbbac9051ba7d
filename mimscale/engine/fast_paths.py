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


def choose(engine: EngineConfig, stage: int = 0, ranks: int = 1) -> FastPaths:
    """The fast paths of an engine that a recipe admits, and its backend, ZeRO stage and number of ranks have."""
    plain: dict[FastPath, str] = {"flat_parameters": "", "norm_check": "", "fused_update": ""}
    if engine.backend == "torch":
        plain["flat_parameters"] = "PyTorch's engine has no cost per parameter"
    elif stage in (1, 2) and ranks == 1:
        plain["one_rank"] = ""
    for path in plain:
        if not engine.uses(path):
            plain[path] = "engine.plain"
    return FastPaths(plain)


def fitted(zero_optimization: Mapping[str, Any], blocks: Sequence[Sequence[int]]) -> dict[str, Any]:
    """DeepSpeed's section `zero_optimization` with its sizes raised to what flat parameters need.

    blocks: of each repeated block the number of elements of its flat parameters. Sizes that a file gives are lower
    bounds: ZeRO-3 fetches a whole block ahead, and keeps each block's smallest parameter (norms and biases) on every
    rank, as it kept its parts before. Buckets stay as they are: a parameter that is larger is reduced where it lies.
    """
    values, flat = dict(zero_optimization), [sizes for sizes in blocks if sizes]
    if flat and values.get("stage") == 3:
        smallest = [min(sizes) for sizes in flat if len(sizes) > 1]
        for key, default, least in (
            ("stage3_prefetch_bucket_size", 50_000_000, max(sum(sizes) for sizes in flat)),
            ("stage3_param_persistence_threshold", 100_000, max(smallest, default=0) + 1),
        ):
            values[key] = max(int(values.get(key, default)), least)
    return values
