"""From the time of a step to a whole run: hours, data that must arrive, checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mimscale.config.run import RunConfig
from mimscale.cost.devices import Device
from mimscale.cost.flops import arithmetic_of, uncropped_share
from mimscale.cost.planner import Planner, Prediction
from mimscale.cost.trace import Shapes
from mimscale.data.wds_stream import open_source
from mimscale.errors import UserError
from mimscale.optim.optimizers.base import optimizer_class

IMAGENET = 1_281_167
"""Images of ImageNet-1K's training set."""
IMAGE_BYTES = 110e3
"""A JPEG of ImageNet-1K: 138 GB over its training images."""
DECODE_S = 1.32e-3
"""CPU time of the loader per image: decoding, cropping, batching (`mimscale bench data`, docs/benchmarks.md)."""
RAND_AUGMENT_SHARE = 0.67
"""CPU time that RandAugment adds, over all else of the loader (`mimscale bench data`, docs/finetuning.md)."""
WRITE_RATE = 1e9
"""Bytes/s at which a shared file system takes a checkpoint; assumed."""
GPU_HOURS_PER_FAILURE = 40_000
"""466 interruptions in 54 days on 16,384 GPUs (Llama 3 herd of models, arXiv 2407.21783, sec. 3.3.4)."""
INTERVAL_S = (300.0, 1800.0)


@dataclass(frozen=True)
class RunCost:
    """A whole run. mfu: of the GPU's peak in the student's precision, recomputation not counted. samples: in the data
    set; assumed: whether that number is ImageNet-1K's, because the data is not here. bytes_per_s: JPEGs that must
    arrive, all ranks together. cores: CPU cores per GPU that decode and augment them. checkpoint_every: steps between
    saves (0: only at the end).
    """

    images_per_s: float
    mfu: float
    samples: int
    assumed: bool
    steps: int
    epoch_s: float
    run_s: float
    gpu_hours: float
    bytes_per_s: float
    cores: float
    checkpoint_bytes: float
    checkpoint_every: int


def samples_of(config: RunConfig) -> tuple[int, bool]:
    """(samples of the recipe's data, whether they are assumed to be ImageNet-1K's because the data is not here)."""
    if config.data.stream is not None:
        return config.data.stream.samples, False
    if "://" in config.data.shards:
        return IMAGENET, True
    try:
        return open_source(config.data).samples, False
    except UserError:
        return IMAGENET, True


def loader_s(config: RunConfig) -> float:
    """CPU seconds of the loader per image; mixing, erasing and colour jitter run on the device and are not in it."""
    return DECODE_S * (1 + (RAND_AUGMENT_SHARE if config.data.rand_augment is not None else 0))


def checkpoint_bytes(shapes: Shapes, samples: int) -> float:
    """Bytes of a checkpoint: master weights, the optimiser's state, buffers, a moving average and AMT's table."""
    config = shapes.config
    count = float(sum(shapes.parameters.values()))
    states = len(optimizer_class(config.optim.name).STATES)
    average = 4.0 * shapes.averaged(whole_groups=False)
    buffers = 4.0 * shapes.frozen
    table = float(samples * math.prod(config.grid)) if uncropped_share(shapes) else 0.0
    return 4.0 * count * (1 + states) + average + buffers + table


def checkpoint_every(step_s: float, size: float, ranks: int) -> int:
    """Steps between saves by the rule of Young and Daly, sqrt(2 x time of a save x time between failures), between five
    minutes and half an hour.
    """
    between_failures = GPU_HOURS_PER_FAILURE * 3600 / ranks
    best = math.sqrt(2 * (size / WRITE_RATE) * between_failures)
    return max(1, round(min(max(best, INTERVAL_S[0]), INTERVAL_S[1]) / step_s))


def run_cost(planner: Planner, found: Prediction, samples: int, assumed: bool) -> RunCost:
    """What a run of the recipe costs with a choice."""
    config, step_s = planner.config, found.time.total
    batch = config.schedule.global_batch
    per_epoch = max(1, samples // batch)
    steps = config.schedule.steps or round((config.schedule.epochs or 0) * per_epoch)
    rate = batch / step_s
    size = checkpoint_bytes(planner.shapes, samples)
    return RunCost(
        images_per_s=rate,
        mfu=mfu(planner, rate, arithmetic_of(config, found.zero.precision), planner.gpu),
        samples=samples,
        assumed=assumed,
        steps=steps,
        epoch_s=per_epoch * step_s,
        run_s=steps * step_s,
        gpu_hours=steps * step_s * planner.ranks / 3600,
        bytes_per_s=rate * IMAGE_BYTES / config.data.crops,
        cores=rate / planner.ranks * loader_s(config),
        checkpoint_bytes=size,
        checkpoint_every=checkpoint_every(step_s, size, planner.ranks) if steps * step_s > INTERVAL_S[1] else 0,
    )


def mfu(planner: Planner, images_per_s: float, precision: str, gpu: Device) -> float:
    return images_per_s / planner.ranks * planner.flops.training / gpu.peak[precision]
