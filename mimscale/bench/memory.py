"""Memory of the data loader: of a rank with a large index, and of workers over many batches"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=float, default=14e6, help="rows of the large index (default: 14 million)")
    parser.add_argument(
        "--batches", type=int, default=2000, help="number of batches of 64 small images (default: 2000)"
    )


def run(args: argparse.Namespace) -> int:
    import torch

    from mimscale.bench import _report

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as base:
        rows = [*_index(Path(base), int(args.samples)), *_many_batches(Path(base), args.batches)]
    _report.publish(args, [(["memory", "MiB"], rows)])
    return 0


def _index(root: Path, samples: int) -> list[list[str]]:
    """Open an index whose shards do not exist, and read rows of all its parts."""
    import numpy as np

    from mimscale.data.manifest import Manifest
    from mimscale.data.order import Order

    folder, per_shard = root / "index", 2500
    folder.mkdir()
    array = np.lib.format.open_memmap(folder / "index.npy", "w+", np.int64, (samples, 2))
    for first in range(0, samples, 1 << 20):
        array[first : first + (1 << 20)] = [512, 110_000]
    array.flush()
    del array
    counts = [per_shard] * (samples // per_shard) + ([samples % per_shard] if samples % per_shard else [])
    shards = [
        {"name": f"shard-{n:06d}.tar", "count": c, "bytes": 1, "sha256": hashlib.sha256(b"%d" % n).hexdigest()}
        for n, c in enumerate(counts)
    ]
    values: dict[str, Any] = {
        "samples": samples,
        "labelled": False,
        "classes": None,
        "seed": 0,
        "options": {},
        "source": {},
    }
    (folder / "manifest.json").write_text(json.dumps({**values, "shards": shards, "index": {"index.npy": "0" * 64}}))
    before = _anonymous_mib(os.getpid()), _resident_mib(os.getpid())
    manifest = Manifest.load(folder, check_shards=False)
    order = Order(manifest, 0)
    for first in range(0, samples, max(1, samples // 200)):
        ids = order.ids(np.arange(first, first + 64))
        manifest.index[ids].sum()
    after = _anonymous_mib(os.getpid()), _resident_mib(os.getpid())
    return [
        [f"index of {samples:,} samples and its order: this process's own", f"{after[0] - before[0]:.0f}"],
        ["the same with the mapped pages, which the node has once", f"{after[1] - before[1]:.0f}"],
        ["whole process, torch included", f"{after[1]:.0f}"],
    ]


def _many_batches(root: Path, batches: int) -> list[list[str]]:
    from mimscale.bench.data import _descendants, _make_shards
    from mimscale.data.config import DataConfig
    from mimscale.data.loader import TrainLoader
    from mimscale.data.manifest import Manifest
    from mimscale.data.synthetic import make_image_folder
    from mimscale.types import Needs

    make_image_folder(root / "images", classes=10, per_class=30, side=48)
    manifest = Manifest.load(_make_shards(root))
    data = DataConfig(shards=manifest.location, image_size=32, workers=1)
    loader = TrainLoader(manifest, data, Needs(), seed=0, global_batch=64, micro_batch=64, rank=0, world=1)
    iterator = iter(loader)
    rows = []
    labels = {max(1, batches // 10): "after a tenth of the batches", batches: f"after {batches:,} batches"}
    for number in range(1, batches + 1):
        next(iterator)
        if number in labels:
            _, *workers = _descendants(os.getpid())
            rows.append([f"worker, {labels[number]}", f"{max(map(_resident_mib, workers)):.1f}"])
    loader.close()
    return rows


def _resident_mib(pid: int) -> float:
    return _status_mib(pid, "VmRSS")


def _anonymous_mib(pid: int) -> float:
    """Without the pages of mapped files, which processes share."""
    return _status_mib(pid, "RssAnon")


def _status_mib(pid: int, name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0
