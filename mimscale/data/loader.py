"""Batches for training and evaluation: manifest + order + noise -> `Batch`, the same for any workers, ranks and resume.

A batch is a function of its positions alone. The sampler hands lists of positions to the workers, a worker turns one
list into one micro-batch; so neither the number of workers nor where a run was interrupted can be seen in the data.
"""

from __future__ import annotations

import atexit
import math
import signal
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mimscale.data.config import DataConfig, default_decoder
from mimscale.data.device_decode import DeviceDecoder
from mimscale.data.manifest import Ints, Manifest
from mimscale.data.order import Jumps, Order, batch_of, rank_positions
from mimscale.data.sample_reader import DamagedSample
from mimscale.data.samples import EvalSamples, TrainSamples
from mimscale.data.shard_prefetch import ShardPrefetcher
from mimscale.data.shm_pool import SharedMemoryPool, opened
from mimscale.data.wds_stream import Source, StreamSamples, WebDatasetStream
from mimscale.errors import UserError
from mimscale.types import Batch, Needs

CPU = torch.device("cpu")
AHEAD = 3  # items that the trainer, its teachers and the thread that pins may hold at a time
Running = Generator[Batch, None, None]
_RUNNING: weakref.WeakSet[Running] = weakref.WeakSet()


class TrainLoader:
    """Endless micro-batches of one rank from `start_step` on: global_batch / (world * micro_batch) of them per step.

    jumps: see `order.batch_of`. pin: put batches into pinned memory. device: where `data.decoder: device` decodes.
    One iteration runs at a time: a new one starts again at `start_step`. Workers end with `close()`, with the
    loader, or with the program. They ignore SIGINT, SIGTERM and SIGUSR1, which SLURM sends to every process of a
    job: when to stop is the trainer's decision. Raises UserError where sizes do not divide or labels are needed and
    missing; iterating raises DamagedSample where nothing at all can be read.
    """

    def __init__(
        self,
        manifest: Source,
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
        device: torch.device = CPU,
    ):
        if micro_batch < 1 or world < 1 or global_batch % (world * micro_batch):
            raise UserError(
                f"global batch {global_batch} is not a multiple of world size {world} x micro-batch {micro_batch}"
            )
        if needs.labels and manifest.labels is None:
            raise UserError(
                f"the method needs labels and '{manifest.folder}' has none; prepare it without --unlabelled"
            )
        positions = Positions(global_batch, micro_batch, rank, world, start_step, data.crops, jumps)
        samples: Dataset[list[Batch]]
        stored = 0  # bytes a picture that the workers hand on
        self._finish: Callable[[Batch], Batch] = lambda batch: batch
        self._ahead: ShardPrefetcher | None = None
        self._look_ahead: Callable[[int], ShardPrefetcher] | None = None
        if isinstance(manifest, WebDatasetStream):
            samples = StreamSamples(manifest, data, needs, seed, global_batch, positions, rank, world)
        else:
            order = Order(manifest, seed, data.streams, data.block)
            samples = TrainSamples(manifest, order, data, needs, seed, global_batch)
            if data.decoder == "device":
                stored = 2 * sum(shard.bytes for shard in manifest.file.shards) // manifest.samples
                plain = data.model_copy(update={"decoder": default_decoder()})
                exact = TrainSamples(manifest, order, plain, replace(needs, uncropped_images=0), seed, global_batch)
                self._finish = DeviceDecoder(exact, device)
            if manifest.cache:
                self._look_ahead = partial(ShardPrefetcher, manifest, order, global_batch, rank, world)
        sampler = None if isinstance(manifest, WebDatasetStream) else positions
        self._open = partial(_data_loader, samples, sampler, workers=data.workers, prefetch=data.prefetch, pin=pin)
        self._parts = global_batch // (world * micro_batch)
        held = AHEAD + (self._parts if data.crops > 1 else 0)
        slots, size = data.workers * data.prefetch + held, item_bytes(data, needs, micro_batch, stored)
        self._pool = partial(SharedMemoryPool, slots, size) if data.workers else lambda: None
        self._start_step, self._crops, self._jumps = start_step, data.crops, jumps
        self._running: Running | None = None

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._running = _run(self._open(pool=self._pool()), self._parts)
        if self._look_ahead is None:
            return map(self._finish, self._running)
        self._ahead = self._look_ahead(batch_of(self._start_step, self._jumps) // self._crops)
        return self._followed(self._running, self._ahead)

    def _followed(self, running: Running, ahead: ShardPrefetcher) -> Iterator[Batch]:
        for number, batch in enumerate(running):
            ahead.step.value = batch_of(self._start_step + number // self._parts, self._jumps) // self._crops
            yield self._finish(batch)

    def close(self) -> None:
        """End the workers. Iterating again starts new ones."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
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
    """Every sample once, in manifest order: rank r has the r-th of `world` consecutive parts.

    Every rank has the same number of batches of the same size, `batch` or its largest part if that is smaller. What a
    rank lacks is filled up at its end with one sample again and again, of weight 0; it must not count.
    Centre crops (see `transforms.centre_crop`), no noise; ids and positions are the same; labels where there are any.
    Nothing is left out or substituted: iterating raises DamagedSample.
    """
    if batch < 1 or not 0 <= rank < world or not 0 < crop_pct <= 1:
        raise UserError(
            f"batch {batch} must be >= 1, rank {rank} below world size {world}, crop_pct {crop_pct} in (0, 1]"
        )
    first, last = (manifest.samples * r // world for r in (rank, rank + 1))
    largest = -(-manifest.samples // world)
    batch = min(batch, largest)
    places = np.arange(first, first + -(-largest // batch) * batch).reshape(-1, batch)
    filler = min(first, manifest.samples - 1)
    parts = [(np.where(row < last, row, filler), (row < last).astype(np.float32)) for row in places]
    samples = EvalSamples(manifest, image_size, crop_pct)
    return _run(_data_loader(samples, parts, workers=workers, prefetch=2, pin=False, pool=None), 1)


class Positions:
    """What the workers are to make, endless, for one rank: (places in the order, positions [rows, micro_batch]).

    Each of `crops` consecutive global batches, a window, takes another crop of the same images: those of the window's
    own place in the order. A run that starts, or jumps, into a window begins with the rest of it.
    """

    def __init__(
        self,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world: int,
        start_step: int,
        crops: int,
        jumps: Jumps = (),
    ):
        self.global_batch, self.micro_batch, self.rank, self.world = global_batch, micro_batch, rank, world
        self.start_step, self.crops, self.jumps = start_step, crops, jumps

    def __iter__(self) -> Iterator[tuple[Ints, Ints]]:
        step = self.start_step
        while True:
            window = batch_of(step, self.jumps) // self.crops
            batches = [batch_of(t, self.jumps) for t in range(step, step + self.crops)]
            batches = [batch for batch in batches if batch // self.crops == window]
            yield from zip(self._cut(window), np.stack([self._cut(batch) for batch in batches], axis=1), strict=True)
            step += len(batches)

    def _cut(self, batch: int) -> Ints:
        return rank_positions(batch, self.global_batch, self.rank, self.world).reshape(-1, self.micro_batch)


def item_bytes(data: DataConfig, needs: Needs, micro_batch: int, stored: int = 0) -> int:
    """What the tensors of one item, a micro-batch for each of `data.crops` steps, take up at most.

    stored: bytes of JPEG in it, a picture on average.
    """
    picture = 3 * data.image_size**2
    drawn = sum(4 * math.prod(noise.shape) for noise in needs.noise.values())
    small = 128  # ids, positions, boxes, flips, labels, places, colour, and what comes with JPEGs
    others = small + drawn + stored + (picture if needs.uncropped_images else 0)
    return data.crops * (micro_batch * (picture + others) + 4096)


def _data_loader(
    samples: Dataset[list[Batch]],
    sampler: Any,
    *,
    workers: int,
    prefetch: int,
    pin: bool,
    pool: SharedMemoryPool | None,
) -> DataLoader[list[Batch]]:
    return DataLoader(
        samples,
        sampler=sampler,
        batch_size=None,  # the samples make whole batches themselves
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=_ignore_signals,
        collate_fn=None if pool is None else pool.pack,
        pin_memory=pin,
        generator=torch.Generator(),  # unused by the samples; without it torch would advance the global one
    )


def _ignore_signals(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _drain(loader: DataLoader[list[Batch]], parts: int) -> Running:
    """Step by step, from items that each hold one micro-batch, of `parts`, for every step of a window.

    Closing this generator, or an error in it, ends the workers. To drop the iterator is not enough: a traceback may
    hold it, and its workers ignore the SIGTERM that would end them.
    """
    items: Any = iter(loader)
    later: list[list[Batch]] = []
    try:
        for first, *rest in map(opened, items):
            yield first
            later.append(rest)
            if len(later) == parts:
                for step in zip(*later, strict=True):
                    yield from step
                later.clear()
    except DamagedSample as error:  # torch hands a worker's on with the traceback as its text
        raise DamagedSample(str(error).rstrip().rpartition("DamagedSample: ")[2]) from None
    finally:
        if loader.num_workers:
            with suppress(RuntimeError):  # a worker was killed: nobody waits for its batches any more
                items._shutdown_workers()
            for worker in items._workers:
                if worker.is_alive():
                    worker.kill()


def _run(loader: DataLoader[list[Batch]], parts: int) -> Running:
    running = _drain(loader, parts)
    _RUNNING.add(running)
    return running


@atexit.register
def _end_workers() -> None:
    """Before multiprocessing's own exit function, which would wait for workers that ignore its SIGTERM."""
    for running in list(_RUNNING):
        running.close()
