"""Batches of random pixels on the device: what a training step needs, without data loading."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mimscale.config.run import RunConfig
from mimscale.types import Batch, Needs, Noise, PrefetchedBatch

SAMPLES = 1_281_167  # of the data set that the images stand for


def make_batch(config: RunConfig, needs: Needs, count: int, uncropped: int = 0) -> Batch:
    """A batch as the loader makes it, in host memory: random pixels, the noise that the method asks for.

    uncropped: how many of the first images are there uncropped as well, where the method asks for some.
    """
    side = config.data.image_size
    random = torch.Generator().manual_seed(config.seed)

    def pixels(images: int) -> Tensor:
        return torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8, generator=random)

    uncropped = min(uncropped, count) if needs.uncropped_images else 0
    return Batch(
        images=pixels(count),
        ids=torch.arange(count),
        positions=torch.arange(count),
        noise={purpose: draw(noise, count, random) for purpose, noise in needs.noise.items()},
        boxes=torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(count, 1),
        flips=torch.zeros(count, dtype=torch.bool),
        labels=torch.randint(0, classes(config), (count,), generator=random) if needs.labels else None,
        uncropped=pixels(uncropped) if needs.uncropped_images else None,
        uncropped_rows=torch.arange(uncropped) if needs.uncropped_images else None,
    )


def draw(noise: Noise, count: int, random: torch.Generator) -> Tensor:
    values = torch.rand(count, *noise.shape, generator=random)
    return -torch.log1p(-values) if noise.kind == "exponential" else values


def classes(config: RunConfig) -> int:
    return int(getattr(config.method, "classes", 2))


def batches(
    config: RunConfig, needs: Needs, micro_batch: int, accumulation: int, device: torch.device
) -> Iterator[PrefetchedBatch]:
    """The same images for ever, at positions that go on. They are normalised anew each time, as a loader's would be."""
    learned = make_batch(config, needs, micro_batch, needs.uncropped_images)
    host = learned if accumulation == 1 else make_batch(config, needs, micro_batch)
    fixed = host.to(device)
    position = 0
    while True:
        first = position % (accumulation * micro_batch) == 0
        raw = replace(learned if first else host, positions=torch.arange(position, position + micro_batch))
        yield PrefetchedBatch(raw, fixed.normalised())
        position += micro_batch
