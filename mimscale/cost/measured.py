"""Measured steps, and what the model says about each: `mimscale plan --fit` prints the comparison.

One H100 80GB HBM3, torch 2.11+cu130, DeepSpeed 0.19.8, commit 1f347fc, synthetic images on the device, median of 3 x 8
steps after 4; allocated memory by torch. The host's cost in `mimscale.cost.devices` was fitted to the times of these
rows; the memory was not. That commit handed DeepSpeed one parameter per parameter of the method.
"""

from __future__ import annotations

from dataclasses import dataclass

from mimscale.config.recipes import load_recipe
from mimscale.cost.devices import DEVICES, GIB, INTERCONNECTS
from mimscale.cost.planner import Choice, Planner


@dataclass(frozen=True)
class Measured:
    """ms: of a step. gib: allocated at most. overrides: to the recipe. note: what the model leaves out."""

    recipe: str
    micro_batch: int
    ds_config: str
    ms: float
    gib: float
    recompute_every: int = 0
    overrides: tuple[str, ...] = ()
    note: str = ""


ROWS = (
    Measured("mae_vit_b16", 512, "zero2_bf16", 221, 23.2),
    Measured("mae_vit_l16", 256, "zero2_bf16", 210, 21.2),
    Measured("mae_vit_l16", 256, "zero2_fp16", 251, 21.2),
    Measured("mae_vit_l16", 256, "zero3_bf16", 513, 22.6),
    Measured("mae_vit_l16", 256, "zero2_bf16", 326, 7.1, recompute_every=1),
    Measured("mae_vit_h14", 128, "zero2_bf16", 291, 23.7),
    Measured("maskalign_vit_l16", 256, "zero2_bf16", 279, 18.4),
    Measured("maskalign_vit_h14", 128, "zero2_fp16", 283, 23.4),
    Measured("maskalign_vit_h14", 128, "zero2_bf16", 346, 23.4, overrides=("teachers.clip.precision=bf16",)),
    Measured(
        "maskalign_vit_l16",
        256,
        "zero2_bf16",
        370,
        23.6,
        overrides=("teachers.clip.precision=fp8", "teachers.clip.compile=false"),
        note="memory of eager quantisation is left out",
    ),
)


@dataclass(frozen=True)
class Compared:
    row: Measured
    ms: float
    gib: float

    @property
    def time_error(self) -> float:
        """Of the prediction, as a share of the measured value."""
        return self.ms / self.row.ms - 1

    @property
    def memory_error(self) -> float:
        return self.gib / self.row.gib - 1


def compare(row: Measured) -> Compared:
    """Predict a measured step."""
    overrides = [*row.overrides, f"schedule.global_batch={row.micro_batch}", "engine.plain=all"]
    config = load_recipe(row.recipe, overrides)
    planner = Planner(config, DEVICES["h100"], INTERCONNECTS["ib8x400"], 1, 1)
    found = planner.predict(Choice(row.ds_config, row.micro_batch, 1, row.recompute_every))
    return Compared(row, 1e3 * found.time.total, found.memory.total / GIB)
