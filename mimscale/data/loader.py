"""Batches for training and evaluation: manifest + order + noise -> `Batch`, the same for any workers, ranks and resume.

A batch is a function of its positions alone. The sampler hands lists of positions to the workers, a worker turns one
list into one micro-batch; so neither the number of workers nor where a run was interrupted can be seen in the data.
"""

from __future__ import annotations

import atexit
import signal
import time
import weakref
from collections.abc import Generator, Iterator
from contextlib import suppress
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mimscale.config import DataConfig
from mimscale.contracts import Batch, Needs, Noise
from mimscale.data import noise
from mimscale.data.decode import BadImage, decode
from mimscale.data.manifest import Ints, Manifest
from mimscale.data.order import Jumps, Order, batch_of, rank_positions
from mimscale.data.transforms import (
    CROP_NUMBERS,
    centre_crop,
    fractions,
    padded_box,
    padded_crop,
    pixels,
    random_box,
    resized,
    resized_crop,
    squeezed,
)
from mimscale.errors import UserError

Running = Generator[Batch, None, None]
_RUNNING: weakref.WeakSet[Running] = weakref.WeakSet()
READ_PAUSES_S = (0.1, 1.0)  # between the tries to read one sample: shared file systems hiccup


class DamagedSample(RuntimeError):
    """A sample that cannot be read or decoded after several tries; the message names its shard and key."""


class TrainLoader:
    """Endless micro-batches of one rank from `start_step` on: global_batch / (world * micro_batch) of them per step.

    jumps: see `order.batch_of`. pin: put batches into pinned memory. One iteration runs at a time: a new one starts
    again at `start_step`. Workers end with `close()`, with the loader, or with the program. They ignore SIGINT, SIGTERM
    and SIGUSR1, which SLURM sends to every process of a job: when to stop is the trainer's decision. Raises UserError
    where sizes do not divide or labels are needed and missing; iterating raises DamagedSample.
    """

    def __init__(
        self,
        manifest: Manifest,
        data: DataConfig,
        needs: Needs,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world: int,
        start_step: int = 0,
        jumps: Jumps = (),
        pin: bool = False,
    ):
        if micro_batch < 1 or world < 1 or global_batch % (world * micro_batch):
            raise UserError(
                f"global batch {global_batch} is not a multiple of world size {world} x micro-batch {micro_batch}"
            )
        if needs.labels and manifest.labels is None:
            raise UserError(
                f"the method needs labels and '{manifest.folder}' has none; prepare it without --unlabelled"
            )
        order = Order(manifest, seed, data.streams, data.block)
        self._loader = _data_loader(
            TrainSamples(manifest, order, data, needs, seed, global_batch),
            Positions(global_batch, micro_batch, rank, world, start_step, jumps),
            workers=data.workers,
            prefetch=data.prefetch,
            pin=pin,
        )
        self._running: Running | None = None

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._running = _run(self._loader)
        return self._running

    def close(self) -> None:
        """End the workers. Iterating again starts new ones."""
        if self._running is not None:
            self._running.close()
            self._running = None


def eval_batches(
    manifest: Manifest,
    image_size: int,
    *,
    batch: int,
    workers: int,
    crop_pct: float = 0.875,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Every sample once, in manifest order: rank r has the r-th of `world` consecutive parts; the last batch is short.

    Centre crops (see `transforms.centre_crop`), no noise; ids and positions are the same; labels where there are any.
    """
    if batch < 1 or not 0 <= rank < world or not 0 < crop_pct <= 1:
        raise UserError(
            f"batch {batch} must be >= 1, rank {rank} below world size {world}, crop_pct {crop_pct} in (0, 1]"
        )
    first, last = (manifest.samples * r // world for r in (rank, rank + 1))
    parts = [np.arange(start, min(start + batch, last)) for start in range(first, last, batch)]
    return _run(_data_loader(EvalSamples(manifest, image_size, crop_pct), parts, workers, prefetch=2, pin=False))


class Positions:
    """The endless list of micro-batches of one rank: int64 [micro_batch] positions each."""

    def __init__(self, global_batch: int, micro_batch: int, rank: int, world: int, start_step: int, jumps: Jumps = ()):
        self.global_batch, self.micro_batch, self.rank, self.world = global_batch, micro_batch, rank, world
        self.start_step, self.jumps = start_step, jumps

    def __iter__(self) -> Iterator[Ints]:
        for step in count(self.start_step):
            positions = rank_positions(batch_of(step, self.jumps), self.global_batch, self.rank, self.world)
            yield from positions.reshape(-1, self.micro_batch)


class TrainSamples(Dataset[Batch]):
    """int64 [B] positions -> Batch of random crops."""

    def __init__(self, manifest: Manifest, order: Order, data: DataConfig, needs: Needs, seed: int, global_batch: int):
        self.manifest, self.order, self.data, self.needs, self.seed = manifest, order, data, needs, seed
        self.global_batch = global_batch

    def __getitem__(self, positions: Ints) -> Batch:
        side, total = self.data.image_size, len(positions)
        ids = self.order.ids(positions)
        places = [divmod(int(position), self.manifest.samples) for position in positions]
        images, boxes = np.empty((total, 3, side, side), np.uint8), np.empty((total, 4), np.float32)
        flips = np.empty(total, np.bool_)
        whole_rows = np.flatnonzero(positions % self.global_batch < self.needs.whole_images)
        whole: list[NDArray[np.uint8]] = []
        for row, (sample, (epoch, place)) in enumerate(zip(ids, places, strict=True)):
            image = load_image(self.manifest, int(sample))
            numbers = noise.uniform(self.seed, "crop", epoch, place, n=CROP_NUMBERS).tolist()
            crop, boxes[row] = self._crop(image, numbers)
            flips[row] = numbers[-1] < self.data.flip
            images[row] = pixels(crop, flips[row])
            if row in whole_rows:
                whole.append(pixels(squeezed(image, side, self.data.interpolation)))
        asked = bool(self.needs.whole_images)
        return Batch(
            images=torch.from_numpy(images),
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(np.array(positions)),
            noise={name: self._noise(name, wanted, places) for name, wanted in self.needs.noise.items()},
            boxes=torch.from_numpy(boxes),
            flips=torch.from_numpy(flips),
            labels=_labels(self.manifest, ids) if self.needs.labels else None,
            whole=torch.from_numpy(_stacked(whole, side)) if asked else None,
            whole_rows=torch.from_numpy(whole_rows) if asked else None,
        )

    def _crop(self, image: Image.Image, numbers: list[float]) -> tuple[Image.Image, tuple[float, ...]]:
        """The crop and its box as fractions of the stored image."""
        data = self.data
        if data.crop == "padded":
            image = resized(image, data.image_size, data.interpolation)
            size = image.height, image.width
            box = padded_box(size, data.image_size, data.crop_padding, numbers[-3:-1])
            return padded_crop(image, box, data.crop_padding), fractions(box, size)
        size = image.height, image.width
        box = random_box(size, data.crop_scale, data.crop_ratio, numbers)
        return resized_crop(image, box, data.image_size, data.interpolation), fractions(box, size)

    def _noise(self, name: str, wanted: Noise, places: list[tuple[int, int]]) -> Tensor:
        draw = noise.uniform if wanted.kind == "uniform" else noise.exponential
        n = int(np.prod(wanted.shape))
        rows = [draw(self.seed, f"noise/{name}", *place, n=n) for place in places]
        return torch.from_numpy(np.stack(rows).reshape(-1, *wanted.shape))


class EvalSamples(Dataset[Batch]):
    """int64 [B] sample ids -> Batch of centre crops."""

    def __init__(self, manifest: Manifest, side: int, crop_pct: float):
        self.manifest, self.side, self.crop_pct = manifest, side, crop_pct

    def __getitem__(self, ids: Ints) -> Batch:
        cut = [centre_crop(load_image(self.manifest, int(i)), self.side, self.crop_pct) for i in ids]
        return Batch(
            images=torch.from_numpy(np.stack([pixels(image) for image, _ in cut])),
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(ids),
            noise={},
            boxes=torch.tensor([box for _, box in cut], dtype=torch.float32),
            flips=torch.zeros(len(ids), dtype=torch.bool),
            labels=None if self.manifest.labels is None else _labels(self.manifest, ids),
        )


def load_image(manifest: Manifest, sample: int) -> Image.Image:
    """Read and decode; a failure is tried again from a freshly opened file. Raises DamagedSample."""
    for pause_s in READ_PAUSES_S:
        with suppress(OSError, BadImage):
            return decode(manifest.read(sample))
        manifest.close()
        time.sleep(pause_s)
    try:
        return decode(manifest.read(sample))
    except (OSError, BadImage) as error:
        shard = manifest.shard_paths[int(manifest.locate(sample)[0])]
        raise DamagedSample(
            f"sample {sample} (key '{_key(manifest, sample)}') of shard '{shard}' cannot be used: {error}; "
            f"`python -m data_prep verify {manifest.folder} --decode` lists all damage"
        ) from error


def _key(manifest: Manifest, sample: int) -> str:
    try:
        return manifest.key(sample)
    except Exception:  # the header may be what is damaged
        return "unreadable"


def _stacked(pictures: list[NDArray[np.uint8]], side: int) -> NDArray[np.uint8]:
    """uint8 [F, 3, side, side], also for F = 0."""
    return np.stack(pictures) if pictures else np.empty((0, 3, side, side), np.uint8)


def _labels(manifest: Manifest, ids: Ints) -> Tensor:
    assert manifest.labels is not None
    return torch.from_numpy(np.array(manifest.labels[ids]))


def _data_loader(samples: Dataset[Batch], sampler: Any, workers: int, prefetch: int, pin: bool) -> DataLoader[Batch]:
    return DataLoader(
        samples,
        sampler=sampler,
        batch_size=None,  # the samples make whole batches themselves
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=_ignore_signals,
        pin_memory=pin,
        generator=torch.Generator(),  # unused by the samples; without it torch would advance the global one
    )


def _ignore_signals(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _drain(loader: DataLoader[Batch]) -> Running:
    """Closing this generator, or an error in it, ends the workers.

    To drop the iterator is not enough: a traceback may hold it, and its workers ignore the SIGTERM that would end them.
    """
    batches: Any = iter(loader)
    try:
        yield from batches
    finally:
        if loader.num_workers:
            batches._shutdown_workers()
            for worker in batches._workers:
                if worker.is_alive():
                    worker.kill()


def _run(loader: DataLoader[Batch]) -> Running:
    running = _drain(loader)
    _RUNNING.add(running)
    return running


@atexit.register
def _end_workers() -> None:
    """Before multiprocessing's own exit function, which would wait for workers that ignore its SIGTERM."""
    for running in list(_RUNNING):
        running.close()
