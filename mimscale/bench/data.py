"""CPU time per image of the data loader, compared with other loaders on the same images"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import suppress
from functools import cache, partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from mimscale.errors import UserError

SIDE, BATCH = 224, 64
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"  # of the published fine-tuning
OURS = "mimscale"  # all others are compared with this one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=512, help="number of JPEGs of about 100 KB (default: 512)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="number of rounds in which every loader is measured once (default: 5)"
    )
    parser.add_argument("--only", nargs="+", help="only rows with one of these words in their name, and mimscale's")
    parser.add_argument("--workers", type=int, default=1, help="worker processes of each loader (default: 1)")


def run(args: argparse.Namespace) -> int:
    if args.images < 4 * BATCH:
        raise UserError(f"--images {args.images}: at least {4 * BATCH}; three batches of {BATCH} are not timed")
    import torch

    from mimscale.bench import _report
    from mimscale.bench._images import write_folder
    from mimscale.bench._other_loaders import OTHER_LOADERS

    torch.set_num_threads(1)
    spawn = multiprocessing.get_context(
        "spawn"
    )  # its workers are forked, which is only safe in a process of one thread
    with tempfile.TemporaryDirectory() as base, ProcessPoolExecutor(1, spawn) as others:
        root = Path(base)
        images, shards = write_folder(root / "images", args.images), _make_shards(root)
        measurements: dict[str, Callable[[], float]] = {
            "libjpeg-turbo, decode alone (floor)": lambda: _decode_all(shards),
            "mimscale, read alone": lambda: _read_all(shards),
            OURS: lambda: _our_loader(shards, "simplejpeg", args.workers),
            "mimscale, Pillow": lambda: _our_loader(shards, "pillow", args.workers),
            "mimscale, RandAugment": lambda: _our_loader(shards, "simplejpeg", args.workers, RAND_AUGMENT),
        }
        missing = {}
        for name in OTHER_LOADERS:
            if not _chosen(name, args.only):
                continue
            place = name, images, root / name.replace(" ", "_"), shards
            try:
                others.submit(_prepare_other, *place).result()
                measurements[name] = partial(_in, others, _other_loader, *place, args.workers)
            except ImportError as error:
                missing[name] = str(error)
        measurements = {name: take for name, take in measurements.items() if _chosen(name, args.only)}
        seconds: dict[str, list[float]] = {name: [] for name in measurements}
        for _ in range(args.rounds):
            for name, measure in measurements.items():
                seconds[name].append(measure())
    rows = [_row(name, values, seconds[OURS]) for name, values in seconds.items()]
    rows += [[f"{name}: not installed ({why})", "", "", ""] for name, why in missing.items()]
    more = (
        f", {args.images} images, batch {BATCH}, {args.workers} worker, medians of {args.rounds} rounds; ratios are "
        "taken inside each round"
    )
    _report.publish(args, [(["loader", "CPU ms per image", "x mimscale", "from - to"], rows)], more=more)
    return 0


def _chosen(name: str, only: list[str] | None) -> bool:
    return only is None or name == OURS or any(word in name for word in only)


def _row(name: str, values: list[float], ours: list[float]) -> list[str]:
    """Only times of the same round are compared, because the load of the machine may change between rounds."""
    ratios = [value / own for value, own in zip(values, ours, strict=True)]
    extremes = f"{min(ratios):.2f} - {max(ratios):.2f}"
    return [name, f"{1e3 * median(values):.2f}", f"{median(ratios):.2f}", extremes]


def _make_shards(root: Path) -> Path:
    import contextlib
    import io

    from data_prep.__main__ import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["folder", str(root / "images"), str(root / "shards"), "--shard-samples", "128"]) == 0
    return root / "shards"


def _decode_all(shards: Path) -> float:
    import numpy as np
    import simplejpeg

    data = _read_jpegs(shards)
    height, width, *_ = simplejpeg.decode_jpeg_header(data[0])
    buffer = np.empty(3 * height * width, np.uint8)
    start_s = time.process_time()
    for one in data:
        simplejpeg.decode_jpeg(one, buffer=buffer)
    return (time.process_time() - start_s) / len(data)


def _read_jpegs(shards: Path) -> list[bytes]:
    from mimscale.data.manifest import Manifest

    manifest = Manifest.load(shards)
    return [manifest.read(sample) for sample in range(manifest.samples)]


def _read_all(shards: Path) -> float:
    """CPU seconds per image for the order, the read-ahead hints and the bytes of each sample."""
    import numpy as np

    from mimscale.data.manifest import Manifest
    from mimscale.data.order import Order

    manifest = Manifest.load(shards)
    order = Order(manifest, 0)
    start_s = time.process_time()
    for first in range(0, manifest.samples, BATCH):
        ids = order.ids(np.arange(first, first + BATCH))
        manifest.read_ahead(ids)
        for sample in ids.tolist():
            manifest.read(sample)
    return (time.process_time() - start_s) / manifest.samples


def _our_loader(shards: Path, decoder: Any, workers: int, rand_augment: str | None = None) -> float:
    from mimscale.data.config import DataConfig
    from mimscale.data.loader import TrainLoader
    from mimscale.data.manifest import Manifest
    from mimscale.types import Needs, Noise

    manifest = Manifest.load(shards)
    data = DataConfig(shards=str(shards), image_size=SIDE, workers=workers, decoder=decoder, rand_augment=rand_augment)
    needs = Needs(noise={"mask": Noise("uniform", ((SIDE // 16) ** 2,))}, labels=True)
    loader = TrainLoader(manifest, data, needs, seed=0, global_batch=BATCH, micro_batch=BATCH, rank=0, world=1)
    return _cpu_s_per_image(loader, manifest.samples // BATCH, loader.close)


def _in(others: Executor, measure: Callable[..., float], *args: Any) -> float:
    return others.submit(measure, *args).result()


def _prepare_other(name: str, images: Path, own: Path, shards: Path) -> None:
    _other_data(name, images, own, shards)


@cache
def _other_data(name: str, images: Path, own: Path, shards: Path) -> Any:
    """Made once, because some write files of their own. Raises ImportError where a loader is not installed."""
    import torch

    from mimscale.bench._other_loaders import OTHER_LOADERS

    torch.set_num_threads(1)
    return OTHER_LOADERS[name](images, own, shards, SIDE)


def _other_loader(name: str, images: Path, own: Path, shards: Path, workers: int) -> float:
    from torch.utils.data import DataLoader, IterableDataset

    data = _other_data(name, images, own, shards)
    shuffle = None if isinstance(data, IterableDataset) else True
    context = "fork" if workers else None  # nothing has to be picklable
    loader = DataLoader(
        data, BATCH, shuffle=shuffle, num_workers=workers, drop_last=True, multiprocessing_context=context
    )
    return _cpu_s_per_image(loader, 10**9, lambda: None)


def _cpu_s_per_image(batches: Iterable[Any], count: int, close: Callable[[], None]) -> float:
    """CPU seconds of this process and its children per image, from the first batch to the last but two.

    The last two batches are not counted: workers prepare batches in advance and may be idle while these are received.
    """
    iterator, marks = iter(batches), [(_cpu_s(), 0)]
    for number, _ in enumerate(islice(iterator, count)):
        marks.append((_cpu_s(), number + 1))
    (start_s, first), (end_s, last) = marks[1], marks[-3]
    close()
    del iterator
    return (end_s - start_s) / (BATCH * (last - first))


def _cpu_s() -> float:
    return sum(_process_cpu_s(pid) for pid in _descendants(os.getpid()))


def _descendants(pid: int) -> Iterator[int]:
    """The process and all of its descendants."""
    yield pid
    for text in _task_files(pid, "children"):
        for child in text.split():
            yield from _descendants(int(child))


def _process_cpu_s(pid: int) -> float:
    """CPU time of all threads of a process, in seconds."""
    return sum(int(text.split()[0]) for text in _task_files(pid, "schedstat")) / 1e9


def _task_files(pid: int, name: str) -> Iterator[str]:
    """The text of /proc/PID/task/*/NAME of every thread; some may just have ended."""
    for path in Path(f"/proc/{pid}/task").glob(f"*/{name}"):
        with suppress(FileNotFoundError, ProcessLookupError):
            yield path.read_text()
