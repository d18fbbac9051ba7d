"""Loss of a small MAE with `engine.student_fp8` beside bf16 and fp32: the same images, masks and initial weights.

On a CPU fp8 is emulated (rounded as on a GPU, multiplied in bf16), so the curves show the rounding and no speed.
"""

from __future__ import annotations

import argparse
from typing import Any

from mimscale.bench._report import publish

RECIPE = "mae_tiny"
SMALL = (
    "data.shards=none",
    "data.image_size=32",
    "student.width=64",
    "student.depth=4",
    "student.heads=4",
    "student.patch=4",
    "method.decoder_width=32",
    "method.decoder_depth=1",
    "method.decoder_heads=4",
    "engine.backend=torch",
)
WAYS = {
    "fp32": ("engine.ds_config=cpu_zero2_fp32",),
    "bf16": ("engine.ds_config=cpu_zero2_bf16",),
    "bf16 with student_fp8": ("engine.ds_config=cpu_zero2_bf16", "engine.student_fp8=true"),
}
LR, WARMUP, IMAGES = 1e-3, 20, 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default=RECIPE, help=f"a recipe without teachers (default: {RECIPE}, made smaller)")
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps (default: 300)")
    parser.add_argument("--batch", type=int, default=32, help="images per step (default: 32)")
    parser.add_argument("--rows", type=int, default=6, help="rows of the table, each a mean over as many steps")


def run(args: argparse.Namespace) -> int:
    curves = {name: losses(args.recipe, way, args.steps, args.batch) for name, way in WAYS.items()}
    heads = ["mean loss of steps", *WAYS, "fp8 - bf16", "bf16 - fp32"]
    publish(args, [(heads, rows(list(curves.values()), args.rows))])
    return 0


def rows(curves: list[list[float]], count: int) -> list[list[str]]:
    """A row per window of steps: mean loss of each curve (fp32, bf16, fp8) and the two differences."""
    found = []
    length = len(curves[0]) // count
    for start in range(0, length * count, length):
        fp32, bf16, fp8 = (sum(curve[start : start + length]) / length for curve in curves)
        values = [f"{value:.4f}" for value in (fp32, bf16, fp8)]
        found.append([f"{start + 1} - {start + length}", *values, f"{fp8 - bf16:+.4f}", f"{bf16 - fp32:+.4f}"])
    return found


def losses(recipe: str, overrides: tuple[str, ...], steps: int, batch: int) -> list[float]:
    """The loss of each step; images and noise depend on the step alone."""
    import torch

    from mimscale.config.deepspeed import load_ds_config
    from mimscale.config.recipes import load_recipe
    from mimscale.config.run import method_class
    from mimscale.distributed.world import from_environment
    from mimscale.engine.factory import make_engine

    torch.set_num_threads(1)
    run = load_recipe(recipe, [*SMALL, f"schedule.global_batch={batch}", "engine.device=cpu", *overrides])
    torch.manual_seed(0)
    method = method_class(run.method.name)(run, {})
    world, ds_config = from_environment("cpu"), load_ds_config(run.engine.ds_config)
    engine = make_engine(method, run, world, micro_batch=batch, accumulation=1, ds_config=ds_config)
    images = _images(run.data.image_size)
    curve = []
    for step in range(steps):
        outputs = engine.forward_backward(_batch(images, method, step, batch), {})
        curve.append(float(outputs["loss"]))
        engine.step(LR * min(1.0, (step + 1) / WARMUP), run.optim.clip)
    engine.close()
    return curve


def _images(side: int) -> Any:
    """Synthetic images, float32 [IMAGES, 3, side, side], normalised."""
    import torch
    import torch.nn.functional as F

    from mimscale.data.synthetic import synthetic_image
    from mimscale.types import IMAGENET_MEAN, IMAGENET_STD

    def one(number: int) -> torch.Tensor:
        pixels = torch.from_numpy(synthetic_image(number % 4, 4, 2 * side, 0, number)).permute(2, 0, 1)[None].float()
        return F.interpolate(pixels / 255, (side, side), mode="bilinear", antialias=True)

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (torch.cat([one(number) for number in range(IMAGES)]) - mean) / std


def _batch(images: Any, method: Any, step: int, batch: int) -> Any:
    import torch

    from mimscale.types import Batch

    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(len(images), (batch,), generator=generator)
    noise = {
        purpose: torch.rand(batch, *wanted.shape, generator=generator) for purpose, wanted in method.needs.noise.items()
    }
    boxes, flips = torch.zeros(batch, 4), torch.zeros(batch, dtype=torch.bool)
    return Batch(images[ids], ids, torch.arange(batch), noise, boxes, flips)
