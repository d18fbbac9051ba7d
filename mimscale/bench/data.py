"""CPU time per picture of the loader, against other loaders on the same pictures"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from mimscale.errors import UserError

SIDE, BATCH = 224, 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=int, default=512, help="how many JPEGs of about 100 KB (default: 512)")
    parser.add_argument("--rounds", type=int, default=5, help="all loaders take turns so often (default: 5)")
    parser.add_argument("--workers", type=int, default=1, help="worker processes of each loader (default: 1)")


def run(args: argparse.Namespace) -> int:
    if args.pictures < 4 * BATCH:
        raise UserError(f"--pictures {args.pictures}: at least {4 * BATCH}; three batches of {BATCH} are not timed")
    if args.rounds < 1 or args.workers < 0:
        raise UserError(f"--rounds {args.rounds} must be at least 1, --workers {args.workers} at least 0")
    import torch

    from mimscale.bench import _report
    from mimscale.bench._images import write_folder
    from mimscale.bench._peers import PEERS

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as base:
        root = Path(base)
        pictures, shards = write_folder(root / "pictures", args.pictures), _shards(root)
        passes: dict[str, Callable[[], float]] = {
            "libjpeg-turbo, decode alone (floor)": lambda: _floor(shards),
            "mimscale, read alone": lambda: _read(shards),
            "mimscale": lambda: _ours(shards, "simplejpeg", args.workers),
            "mimscale, Pillow": lambda: _ours(shards, "pillow", args.workers),
        }
        missing = {}
        for name, make in PEERS.items():
            try:
                data = make(pictures, root / name.replace(" ", "_"), shards, SIDE)
                passes[name] = partial(_theirs, data, args.workers)
            except ImportError as error:
                missing[name] = str(error)
        found: dict[str, list[float]] = {name: [] for name in passes}
        for _ in range(args.rounds):
            for name, one in passes.items():
                found[name].append(one())
    rows = [_row(name, values, found["mimscale"]) for name, values in found.items()]
    rows += [[f"{name}: not installed ({why})", "", "", ""] for name, why in missing.items()]
    print(_report.table(["loader", "CPU ms per picture", "x mimscale", "from - to"], rows))
    print(
        f"\n{_report.origin()}, {args.pictures} pictures, batch {BATCH}, {args.workers} worker, medians of "
        f"{args.rounds} rounds; ratios are taken inside each round"
    )
    return 0


def _row(name: str, values: list[float], ours: list[float]) -> list[str]:
    """The machine may be busier in one round than in another: only numbers of one round are compared."""
    ratios = [value / own for value, own in zip(values, ours, strict=True)]
    spread = f"{min(ratios):.2f} - {max(ratios):.2f}"
    return [name, f"{1e3 * median(values):.2f}", f"{median(ratios):.2f}", spread]


def _shards(root: Path) -> Path:
    import contextlib
    import io

    from data_prep.__main__ import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["folder", str(root / "pictures"), str(root / "shards"), "--shard-samples", "128"]) == 0
    return root / "shards"


def _floor(shards: Path) -> float:
    import numpy as np
    import simplejpeg

    data = _bytes(shards)
    height, width, *_ = simplejpeg.decode_jpeg_header(data[0])
    buffer = np.empty(3 * height * width, np.uint8)
    start_s = time.process_time()
    for one in data:
        simplejpeg.decode_jpeg(one, buffer=buffer)
    return (time.process_time() - start_s) / len(data)


def _bytes(shards: Path) -> list[bytes]:
    from mimscale.data.manifest import Manifest

    manifest = Manifest.load(shards)
    return [manifest.read(sample) for sample in range(manifest.samples)]


def _read(shards: Path) -> float:
    """Order, hints, and the bytes of each sample."""
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


def _ours(shards: Path, decoder: Any, workers: int) -> float:
    from mimscale.data.config import DataConfig
    from mimscale.data.loader import TrainLoader
    from mimscale.data.manifest import Manifest
    from mimscale.types import Needs, Noise

    manifest = Manifest.load(shards)
    data = DataConfig(shards=str(shards), image_size=SIDE, workers=workers, decoder=decoder)
    needs = Needs(noise={"mask": Noise("uniform", ((SIDE // 16) ** 2,))}, labels=True)
    loader = TrainLoader(manifest, data, needs, seed=0, global_batch=BATCH, micro_batch=BATCH, rank=0, world=1)
    return _drained(loader, manifest.samples // BATCH, loader.close)


def _theirs(data: Any, workers: int) -> float:
    from torch.utils.data import DataLoader, IterableDataset

    shuffle = None if isinstance(data, IterableDataset) else True
    loader = DataLoader(data, BATCH, shuffle=shuffle, num_workers=workers, drop_last=True)
    return _drained(loader, 10**9, lambda: None)


def _drained(batches: Iterable[Any], count: int, close: Callable[[], None]) -> float:
    """CPU seconds of this process and its children per picture, from the first batch to the last but two.

    While the last two are handed over a worker may have nothing more to do: what it did ahead would not be counted.
    """
    running, marks = iter(batches), [(_cpu_s(), 0)]
    for number, _ in enumerate(islice(running, count)):
        marks.append((_cpu_s(), number + 1))
    (start_s, first), (end_s, last) = marks[1], marks[-3]
    close()
    del running
    return (end_s - start_s) / (BATCH * (last - first))


def _cpu_s() -> float:
    return sum(_of_process(pid) for pid in _family(os.getpid()))


def _family(pid: int) -> Iterator[int]:
    yield pid
    for text in _of_tasks(pid, "children"):
        for child in text.split():
            yield from _family(int(child))


def _of_process(pid: int) -> float:
    """Nanosecond counters of every thread, in seconds."""
    return sum(int(text.split()[0]) for text in _of_tasks(pid, "schedstat")) / 1e9


def _of_tasks(pid: int, name: str) -> Iterator[str]:
    """What the system says of each thread of a process; some may just have ended."""
    for path in Path(f"/proc/{pid}/task").glob(f"*/{name}"):
        with suppress(FileNotFoundError, ProcessLookupError):
            yield path.read_text()
