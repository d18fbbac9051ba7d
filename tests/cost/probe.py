"""What a real engine does, counted, on any ranks.

    python -m tests.cost.probe [RECIPE] MICRO_BATCH ACCUMULATION DS_CONFIG... [-- key=value ...]

Trains a small MAE, or RECIPE, for two steps with each DeepSpeed config and prints, on every rank, a line of JSON: per
config the collectives of the second step as [operator, bytes, from a forward or backward pass or the update], the
allocated bytes at most (by torch's profiler), the lengths of this rank's fragments, and whether the update was fused.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mimscale.config.deepspeed import load_ds_config
from mimscale.config.recipes import load_recipe
from mimscale.config.run import RunConfig, method_class
from mimscale.distributed.world import World, from_environment
from mimscale.engine.factory import make_engine, open_process_group
from mimscale.types import Batch

OVERRIDES = ["student.width=192", "student.depth=6", "method.decoder_width=128"]


class Collectives(TorchDispatchMode):
    """found: [operator, bytes of its largest tensor, phase]."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int, str]] = []
        self.phase = "pass"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sizes = [t.numel() * t.element_size() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self.found.append((func._schema.name.split("::")[1], max(sizes, default=0), self.phase))
        return func(*args, **(kwargs or {}))


def configuration(
    ds_config: str, micro: int, accumulation: int, ranks: int, overrides: list[str], recipe: str = ""
) -> RunConfig:
    batches = [f"schedule.global_batch={micro * accumulation * ranks}", f"engine.max_micro_batch={micro}"]
    size = [] if recipe else OVERRIDES
    return load_recipe(recipe or "mae_tiny", [*size, *batches, f"engine.ds_config={ds_config}", *overrides])


def make_batch(config: RunConfig, method: Any, count: int) -> Batch:
    side = config.data.image_size
    return Batch(
        images=torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8),
        ids=torch.arange(count),
        positions=torch.arange(count),
        noise={name: torch.rand(count, *noise.shape) for name, noise in method.needs.noise.items()},
        boxes=torch.zeros(count, 4),
        flips=torch.zeros(count, dtype=torch.bool),
        labels=torch.zeros(count, dtype=torch.int64) if method.needs.labels else None,
    ).normalised()


def allocated(profiler: Any, already: int) -> tuple[int, int]:
    """(bytes at the end, at most) by the profiler's events, from `already` allocated bytes on."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = already
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return now, most


def probe(
    ds_config: str, micro: int, accumulation: int, world: World, overrides: list[str], recipe: str
) -> dict[str, Any]:
    config = configuration(ds_config, micro, accumulation, world.size, overrides, recipe)
    gc.collect()  # the engine before would be freed while this one is counted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as built:
        torch.manual_seed(world.rank)  # other images on each rank; DeepSpeed gives all the weights of rank 0
        method = method_class(config.method.name)(config, {})
        batch = make_batch(config, method, micro)
        engine = make_engine(
            method,
            config,
            world,
            micro_batch=micro,
            accumulation=accumulation,
            ds_config=load_ds_config(ds_config),
        )
    counter = Collectives()

    losses: list[float] = []

    def step() -> None:
        counter.found.clear()
        counter.phase = "pass"
        for _ in range(accumulation):
            losses.append(float(engine.forward_backward(batch, {})["loss"]))
        counter.phase = "update"
        engine.step(1e-3, 1.0)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as first:
        step()
    with counter:
        step()
    now, _ = allocated(built, 0)
    optimizer: Any = engine._optimizer  # type: ignore[attr-defined]
    found = {
        "collectives": counter.found,
        "losses": losses,
        "start": now,
        "peak": allocated(first, now)[1],
        "fragments": {key: value.numel() for key, value in engine.fragments().items()},
        "fused": bool(optimizer.param_groups[0].get("fused")),
        "leaves": [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups],
    }
    engine.close()
    return found


if __name__ == "__main__":
    words = sys.argv[1:]
    named = "" if words[0].isdigit() else words.pop(0)
    cut = words.index("--") if "--" in words else len(words)
    (images, times), names, changes = map(int, words[:2]), words[2:cut], words[cut + 1 :]
    place = from_environment("cpu")
    open_process_group(place, configuration(names[0], images, times, place.size, changes, named).engine)
    results = {name: probe(name, images, times, place, changes, named) for name in names}
    print("\n" + json.dumps({"rank": place.rank, **results}), flush=True)
    os._exit(0)
