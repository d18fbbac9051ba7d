"""Batches for training and evaluation: manifest + order + noise -> `Batch`, independent of ranks, workers and resumes.

A batch is a function of its positions alone. The sampler sends lists of positions to the workers and a worker turns one
list into one micro-batch, so the data depends neither on the number of workers nor on where a run was interrupted.
"""

from __future__ import annotations

import atexit
import math
import multiprocessing
import os
import select
import signal
import time
import traceback
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from mimscale.data.augment import with_partners
from mimscale.data.config import DataConfig
from mimscale.data.datasets import EvalDataset, TrainDataset
from mimscale.data.manifest import Ints, Manifest
from mimscale.data.mixture import Mixture, order_of
from mimscale.data.order import Jumps, batch_of, rank_positions
from mimscale.data.sample_reader import DamagedSample
from mimscale.data.shard_prefetch import ShardPrefetcher
from mimscale.data.shm_pool import SharedMemoryPool, unpack
from mimscale.data.wds_stream import Source, StreamDataset, WebDatasetStream
from mimscale.errors import UserError, warn
from mimscale.types import Batch, Needs

HELD_ITEMS = 4  # items that the trainer, its teachers, copies to the device and hooks may hold at the same time
EVAL_PREFETCH = 2
LARGEST_SIDE = 1 << 16  # pixels of the short side from which the evaluation's crop is cut
BatchGenerator = Generator[Batch, None, None]
MakeLoader = Callable[[int], tuple[DataLoader[list[Batch]], SharedMemoryPool | None]]
"""Makes a loader whose workers write a byte into the pipe of this descriptor when they begin, and its pool."""
START_S, STARTS = 30.0, 4
"""Seconds in which every worker must have begun, and how often workers are started; see `_start`."""
_OPEN_GENERATORS: weakref.WeakSet[BatchGenerator] = weakref.WeakSet()


class TrainLoader:
    """Endless micro-batches of one rank from `start_step` on: global_batch / (world * micro_batch) of them per step.

    jumps: see `order.batch_of`. pin: put batches into pinned memory.
    Only one iterator exists at a time: a new one ends the last one and starts again at `start_step`. Workers end with
    `close()`, with the loader, or with the program. They ignore SIGINT, SIGTERM and SIGUSR1, which SLURM sends to every
    process of a job, because the trainer decides when to stop. Raises UserError if sizes do not divide or if labels are
    needed and missing; iterating raises DamagedSample if no sample can be read.
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
    ):
        if micro_batch < 1 or world < 1 or global_batch % (world * micro_batch):
            raise UserError(
                f"global batch {global_batch} is not a multiple of world size {world} x micro-batch {micro_batch}"
            )
        if needs.labels and manifest.labels is None:
            raise UserError(
                f"the method needs labels and '{manifest.folder}' has none; prepare it without --unlabelled"
            )
        mixes = needs.mixing is not None
        unit = 2 if mixes and global_batch % (2 * world) == 0 else 1
        sampler = PositionSampler(global_batch, micro_batch, rank, world, start_step, data.crops, jumps, unit, mixes)
        dataset: Dataset[list[Batch]]
        self._make_shard_prefetcher: Callable[[int], ShardPrefetcher] | None = None
        self._shard_prefetcher: ShardPrefetcher | None = None
        if isinstance(manifest, WebDatasetStream):
            dataset = StreamDataset(manifest, data, needs, seed, global_batch, sampler, rank, world)
        else:
            order = order_of(manifest, seed, data.streams, data.block)
            dataset = TrainDataset(manifest, order, data, needs, seed, global_batch)
            if manifest.cache:
                self._make_shard_prefetcher = partial(
                    ShardPrefetcher, manifest, order, global_batch, rank, world, unit=unit
                )
        self._micro_batches = global_batch // (world * micro_batch)  # per step
        held = HELD_ITEMS + (self._micro_batches if data.crops > 1 else 0)
        rows = next(iter(sampler))[0].size if mixes else micro_batch
        slots, size = data.workers * data.prefetch + held, batch_bytes(data.image_size, needs, rows)
        self._make_loader = partial(
            _data_loader,
            dataset,
            None if isinstance(manifest, WebDatasetStream) else sampler,
            workers=data.workers,
            prefetch=data.prefetch,
            make_pool=partial(SharedMemoryPool, slots, size, data.crops),
        )
        self._start_step, self._crops, self._jumps, self._pin = start_step, data.crops, jumps, pin
        self._batches: BatchGenerator | None = None

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._batches = _open_generator(self._make_loader, self._micro_batches, self._pin)
        if self._make_shard_prefetcher is None:
            return self._batches
        self._shard_prefetcher = self._make_shard_prefetcher(batch_of(self._start_step, self._jumps) // self._crops)
        return self._with_shard_prefetcher(self._batches, self._shard_prefetcher)

    def _with_shard_prefetcher(self, batches: BatchGenerator, prefetcher: ShardPrefetcher) -> Iterator[Batch]:
        for number, batch in enumerate(batches):
            step = self._start_step + number // self._micro_batches
            prefetcher.advance(batch_of(step, self._jumps) // self._crops)
            yield batch

    def close(self) -> None:
        """End the workers. Iterating again starts new ones."""
        if self._shard_prefetcher is not None:
            self._shard_prefetcher.close()
            self._shard_prefetcher = None
        if self._batches is not None:
            self._batches.close()
            self._batches = None


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

    Every rank has the same number of batches of the same size: `batch`, or the largest part if that is smaller. The
    last batches of a rank with fewer samples are padded with repeats of one sample; `Batch.weights` is 0 for these.
    Center crops (see `transforms.center_crop`), no noise; ids and positions are equal; labels if there are any.
    Nothing is left out or substituted: iterating raises DamagedSample.
    """
    if batch < 1 or not 0 <= rank < world or not 0 < crop_pct <= 1:
        raise UserError(
            f"batch {batch} must be >= 1, rank {rank} below world size {world}, crop_pct {crop_pct} in (0, 1]"
        )
    if image_size / crop_pct > LARGEST_SIDE:
        raise UserError(
            f"crop_pct = {crop_pct:g} enlarges the short side of an image to {image_size / crop_pct:,.0f} pixels; give "
            "a larger one, 0.875 is usual"
        )
    first, last = (manifest.samples * r // world for r in (rank, rank + 1))
    largest = -(-manifest.samples // world)
    batch = min(batch, largest)
    padded_ids = np.arange(first, first + -(-largest // batch) * batch).reshape(-1, batch)
    padding = min(first, manifest.samples - 1)
    batches = [(np.where(ids < last, ids, padding), (ids < last).astype(np.float32)) for ids in padded_ids]
    return listed_batches(manifest, image_size, batches, workers=workers, crop_pct=crop_pct)


def listed_batches(
    manifest: Manifest,
    image_size: int,
    batches: Sequence[tuple[Ints, NDArray[np.float32]]],
    *,
    workers: int,
    crop_pct: float = 0.875,
) -> Iterator[Batch]:
    """The images of `eval_batches` in batches that the caller has chosen.

    batches: int64 [B] sample ids and float32 [B] `Batch.weights` of each. Iterating raises DamagedSample.
    """
    if not 0 < crop_pct <= 1:
        raise UserError(f"crop_pct {crop_pct} must be in (0, 1]")
    dataset = EvalDataset(manifest, image_size, crop_pct)
    largest = max((len(ids) for ids, _ in batches), default=1)
    slots, size = workers * EVAL_PREFETCH + HELD_ITEMS, batch_bytes(image_size, Needs(), largest)
    make_pool = partial(SharedMemoryPool, slots, size)
    return _open_generator(
        partial(_data_loader, dataset, batches, workers=workers, prefetch=EVAL_PREFETCH, make_pool=make_pool), 1
    )


class PositionSampler:
    """Endless items for the workers of one rank: (image positions int64 [B], crop positions int64 [rows, B]).

    B = micro_batch. A window is `crops` consecutive global batches that take different crops of the same images: global
    batch number w of the order for window w. There is one row of crop positions for each batch of the window. A run
    that starts in the middle of a window, or jumps there, yields only the remaining rows. With crops = 1 there is one
    row, equal to the image positions.

    unit: see `rank_positions`. mixes: B grows by the partners that images are mixed with and that are elsewhere (see
    `augment.with_partners`).
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
        unit: int = 1,
        mixes: bool = False,
    ):
        self.global_batch, self.micro_batch, self.rank, self.world = global_batch, micro_batch, rank, world
        self.unit, self.mixes = unit, mixes
        self.start_step, self.crops, self.jumps = start_step, crops, jumps

    def __iter__(self) -> Iterator[tuple[Ints, Ints]]:
        step = self.start_step
        while True:
            window = batch_of(step, self.jumps) // self.crops
            batches = [batch_of(t, self.jumps) for t in range(step, step + self.crops)]
            batches = [batch for batch in batches if batch // self.crops == window]
            crop_positions = np.stack([self._micro_batch_positions(batch) for batch in batches], axis=1)
            yield from zip(self._micro_batch_positions(window), crop_positions, strict=True)
            step += len(batches)

    def _micro_batch_positions(self, batch: int) -> Ints:
        """int64 [micro-batches per step, B]: this rank's positions in one global batch."""
        positions = rank_positions(batch, self.global_batch, self.rank, self.world, self.unit)
        rows = positions.reshape(-1, self.micro_batch)
        return with_partners(rows) if self.mixes else rows


def batch_bytes(image_size: int, needs: Needs, micro_batch: int) -> int:
    """Upper bound, in bytes, of the tensors of one micro-batch out of the loader."""
    image = 3 * image_size**2
    noise = sum(4 * math.prod(wanted.shape) for wanted in needs.noise.values())
    small = 128  # ids, positions, boxes, flips, labels, weights, row numbers, colour
    return micro_batch * (image + small + noise + (image if needs.uncropped_images else 0)) + 4096


def _data_loader(
    dataset: Dataset[list[Batch]],
    sampler: Any,
    begun: int,
    *,
    workers: int,
    prefetch: int,
    make_pool: Callable[[], SharedMemoryPool],
) -> tuple[DataLoader[list[Batch]], SharedMemoryPool | None]:
    pool = make_pool() if workers else None
    loader = DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,  # an item of the dataset is a complete batch
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=partial(_begin, begun, pool),
        collate_fn=None if pool is None else pool.pack,
        generator=torch.Generator(),  # the datasets do not use it; without it torch would advance the global generator
    )
    return loader, pool


def _begin(begun: int, pool: SharedMemoryPool | None, worker: int) -> None:
    """In a new worker. begun: descriptor of a pipe in which each worker writes a byte. pool: images are made in it."""
    info: Any = get_worker_info()
    if pool is not None:
        info.dataset.use(pool.images)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.write(begun, b".")


def _start(make_loader: MakeLoader) -> tuple[Any, SharedMemoryPool | None]:
    """The loader's iterator, with every worker at work, and its pool.

    Workers are forked from a process that has threads (gloo's, autograd's). A lock that such a thread holds at that
    moment stays locked in the worker, which then waits for ever: rare, but a run of thousands of workers would meet it.
    (Seen in CPython 3.11, where `fork` in the child waits for the list of the interpreter's threads.) A worker that has
    not begun after START_S is killed with the others, and all are forked again: nothing is lost, because no batch was
    taken.
    """
    for _ in range(STARTS):
        read, write = os.pipe()
        try:
            loader, pool = make_loader(write)
            items: Any = _iterator(loader)
            try:
                if _all_begun(read, loader.num_workers):
                    return items, pool
            except BaseException:
                _end(items)
                raise
        finally:
            os.close(read)
            os.close(write)
        _end(items)
        warn(f"data: a worker did not begin within {START_S:g} s, all {loader.num_workers} are started again")
    raise RuntimeError(f"data: workers did not begin within {START_S:g} s, {STARTS} times; is this machine overloaded?")


def _iterator(loader: DataLoader[list[Batch]]) -> Any:
    """`iter(loader)`. Where it fails half-way (no file or process is left at the n-th worker, the sampler raises), the
    workers that it has started are ended: nobody else knows them, and the process would wait for them at its exit."""
    before = set(multiprocessing.active_children())
    try:
        return iter(loader)
    except BaseException as error:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            half = frame.f_locals.get("self")
            if isinstance(half, _MultiProcessingDataLoaderIter) and hasattr(half, "_workers_status"):
                _end(half)  # the sampler failed; torch watches the workers already
            elif isinstance(half, _MultiProcessingDataLoaderIter):
                half._shutdown = True  # else its __del__ would fail too, in a traceback of its own
        for worker in set(multiprocessing.active_children()) - before:
            worker.kill()
            worker.join(5.0)
        if isinstance(error, OSError):
            raise UserError(
                f"data.workers = {loader.num_workers}: a worker cannot be started ({error.strerror}); raise the limit "
                f"that `ulimit -a` shows, make room in /dev/shm for semaphores, or take fewer workers"
            ) from error
        raise


def _all_begun(read: int, workers: int) -> bool:
    deadline = time.monotonic() + START_S
    while workers and select.select([read], [], [], max(0.0, deadline - time.monotonic()))[0]:
        workers -= len(os.read(read, workers))
    return workers == 0


def _end(items: Any) -> None:
    """End the workers of a loader's iterator. Dropping it would not be enough: a traceback may hold it, and its workers
    ignore the SIGTERM that would end them."""
    workers = getattr(items, "_workers", ())  # none without workers
    if workers:
        with suppress(RuntimeError):  # a worker was killed, and its batches are no longer needed
            items._shutdown_workers()
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def _iterate(make_loader: MakeLoader, micro_batches: int, pin: bool) -> BatchGenerator:
    """Micro-batches in the order of steps, `micro_batches` per step.

    An item of the loader holds one micro-batch for every step of a window: the first is yielded at once, the others are
    kept until their step comes. pin: in pinned memory, which the pool's is, if it can be; then nothing is copied.
    Closing this generator, or an error in it, ends the workers.
    """
    items, pool = _start(make_loader)
    later_steps: list[list[Batch]] = []
    if pin and pool is not None and (error := pool.pin()) is not None:
        warn(f"data: the workers' memory cannot be pinned ({error}); each batch is copied once more")
    try:
        for first, *others in map(unpack, items):
            yield first.pin_memory() if pin else first
            later_steps.append([batch.pin_memory() for batch in others] if pin else others)
            if len(later_steps) == micro_batches:
                for step in zip(*later_steps, strict=True):
                    yield from step
                later_steps.clear()
    except DamagedSample as error:  # torch raises a worker's error again, with the traceback in its text
        raise DamagedSample(str(error).rstrip().rpartition("DamagedSample: ")[2]) from None
    except RuntimeError as error:
        if "DataLoader worker" in str(error):  # one has ended; of a SIGBUS torch thinks that it lacks shared memory
            _refuse_cut_index(items)
        raise
    finally:
        _end(items)


def _refuse_cut_index(items: Any) -> None:
    """A worker that reads a mapped file behind its end gets SIGBUS. Raises UserError that names such a file."""
    manifest = getattr(items._dataset, "manifest", None)
    if isinstance(manifest, Manifest | Mixture) and (path := manifest.cut_file()) is not None:
        raise UserError(f"'{path}' was cut or replaced while it was in use; make it again, and start again") from None


def _open_generator(make_loader: MakeLoader, micro_batches: int, pin: bool = False) -> BatchGenerator:
    batches = _iterate(make_loader, micro_batches, pin)
    _OPEN_GENERATORS.add(batches)
    return batches


@atexit.register
def _end_workers() -> None:
    """Runs before multiprocessing's own exit function, which would wait for workers that ignore its SIGTERM."""
    for batches in list(_OPEN_GENERATORS):
        batches.close()
