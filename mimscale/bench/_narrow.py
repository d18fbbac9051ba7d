"""A recipe's structure at a width where arithmetic costs nothing: all blocks, heads and levels, a few channels each."""

from __future__ import annotations

from typing import Any

from mimscale.config.recipes import validate
from mimscale.config.run import RunConfig
from mimscale.teachers.ensemble import build_skeletons, describe

WIDTH, HEADS, PATCH, SIDE = 32, 2, 8, 32


def narrow(config: RunConfig, batch: int) -> RunConfig:
    """The recipe with width 32, 32-pixel images and `batch` images per step, on a CPU; depths and options are its own.

    Each teacher becomes a timm ViT of the same depth, 32 wide, with random weights and with a class token if it had
    one. Raises UserError.
    """
    values = config.dump()
    values["data"] |= {"image_size": SIDE}
    values["student"] |= {"size": None, "width": WIDTH, "depth": config.student.depth, "heads": HEADS, "patch": PATCH}
    values["method"] = _narrow_method(values["method"])
    if config.teachers:
        described = describe(build_skeletons(config.teachers, config.data.image_size))
        values["teachers"] = {name: _narrow_teacher(info.depth, info.has_cls) for name, info in described.items()}
    values["schedule"] = {"steps": 10**6, "global_batch": batch, "base_lr": 1e-6}
    values["engine"] |= {"max_micro_batch": batch, "device": "cpu", "teachers_ahead": False}
    values["init"] = None
    return validate(values, source="the narrow recipe")


def _narrow_method(values: dict[str, Any]) -> dict[str, Any]:
    found = dict(values)
    small = {"decoder_width": WIDTH, "decoder_heads": HEADS, "classes": 10}
    found |= {key: value for key, value in small.items() if key in values}
    if values.get("low_pass_radius"):
        found["low_pass_radius"] = SIDE / 4
    if values.get("stages"):
        widths = [WIDTH // 4, WIDTH // 2]
        found["stages"] = {**values["stages"], "patches": [2, 2, 2], "widths": widths}
    masking = values.get("masking")
    if masking:
        found["masking"] = {**masking, **({"unit": 2 * PATCH} if masking.get("unit") else {})}
        if "warmup_epochs" in masking:  # AMT draws uniform masks until then
            found["masking"]["warmup_epochs"] = 0.0
    return found


def _narrow_teacher(depth: int, has_cls: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"embed_dim": WIDTH, "depth": depth, "num_heads": HEADS, "patch_size": PATCH}
    if not has_cls:
        options |= {"class_token": False, "global_pool": "avg"}
    model = {"library": "timm", "model": "vit_tiny_patch16_224", "options": options, "image_size": SIDE}
    return {**model, "random": True, "precision": "fp32"}
