"""Is a data set fit for a job of so many ranks and workers with such a batch? What is not gets its exact fix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm
from pathlib import Path

import numpy as np

from data_prep.info import class_lines, class_sizes, known_size
from mimscale.data.manifest import Manifest
from mimscale.data.order import Order, rank_positions

SMALL_SHARD, LARGE_SHARD = 32 << 20, 2 << 30  # bytes; between them copying is sequential and a lost shard cheap
UNEVEN = 1.5  # largest shard / smallest, beyond which a cache of shards is hard to size
COUNTED = 2_000_000  # positions of a node over which its shards are counted at most


@dataclass(frozen=True)
class Job:
    """ranks: data-parallel, all nodes together. streams, block: `data.streams` and `data.block` of the recipe."""

    ranks: int
    global_batch: int
    workers: int = 8
    ranks_per_node: int = 8
    streams: int = 256
    block: int = 8192
    labels: bool = False


@dataclass(frozen=True)
class Finding:
    """One line. fix: what to do about it; "" = it is fine as it is."""

    text: str
    fix: str = ""


def examine(folder: Path, job: Job) -> list[Finding]:
    """Raises UserError if there is no readable data set or a shard of it is missing."""
    manifest = Manifest.load(folder)
    return [
        Finding(f"{manifest.samples:,} samples in {len(manifest.counts):,} shards, all there with their lengths"),
        *map(Finding, known_size(manifest)),
        *_batch(manifest, job),
        *_shards(manifest),
        *_workers(manifest, job),
        *_locality(manifest, job),
        *_classes(manifest, job),
        *_checksums(manifest),
    ]


def _batch(manifest: Manifest, job: Job) -> Iterator[Finding]:
    batch, ranks = job.global_batch, job.ranks
    if batch % ranks:
        below, above = batch // ranks * ranks, -(-batch // ranks) * ranks
        fitting = max(r for r in range(1, ranks + 1) if batch % r == 0)
        near = f"{below:,} or {above:,}" if below else f"{above:,}"
        yield Finding(
            f"global batch {batch:,} is not a multiple of {ranks:,} ranks",
            f"schedule.global_batch={near}, or {fitting:,} ranks",
        )
    else:
        steps = manifest.samples // batch
        yield Finding(f"global batch {batch:,}: {batch // ranks:,} samples per rank, {steps:,} steps per epoch")
    if batch > manifest.samples:
        yield Finding(
            f"a global batch of {batch:,} is more than the data set: steps per epoch would be 0",
            f"schedule.global_batch of at most {manifest.samples:,}, or give schedule.steps",
        )


def _shards(manifest: Manifest) -> Iterator[Finding]:
    sizes = np.array([shard.bytes for shard in manifest.file.shards])
    text = f"shards of {sizes.min() / 2**20:,.1f} to {sizes.max() / 2**20:,.1f} MiB"
    again = "make the shards again with --shard-mb 256"
    if sizes.max() > LARGE_SHARD:
        yield Finding(f"{text}: above {LARGE_SHARD >> 20:,} MiB a node's cache holds few of them", again)
    elif len(sizes) > 1 and np.median(sizes) < SMALL_SHARD:
        yield Finding(f"{text}: below {SMALL_SHARD >> 20} MiB a file system spends its time on opening them", again)
    elif sizes.max() > UNEVEN * sizes.min():
        yield Finding(f"{text}: the largest is {sizes.max() / sizes.min():.1f} times the smallest", again)
    else:
        yield Finding(text)


def _workers(manifest: Manifest, job: Job) -> Iterator[Finding]:
    """Exactly even here, whatever the shards; a plain WebDataset pipeline deals out whole shards."""
    readers, shards = job.ranks * max(1, job.workers), len(manifest.counts)
    whole = "" if shards % readers == 0 else ", which a plain WebDataset pipeline could not deal out evenly"
    yield Finding(
        f"{job.ranks:,} ranks x {job.workers} workers: every rank gets equal batches, every sample once per epoch "
        f"({shards:,} shards for {readers:,} readers{whole})"
    )


def _locality(manifest: Manifest, job: Job) -> Iterator[Finding]:
    """How many shards one node reads in an epoch: what its cache must hold, and what the file system must serve."""
    order = Order(manifest, 0, job.streams, job.block)
    nodes = -(-job.ranks // job.ranks_per_node)
    per_node = min(job.ranks_per_node, job.ranks)
    if job.global_batch % job.ranks or nodes == 1:
        return
    steps = max(1, min(manifest.samples // job.global_batch, COUNTED // (job.global_batch // nodes or 1)))
    touched: set[int] = set()
    for step in range(steps):
        positions = [rank_positions(step, job.global_batch, rank, job.ranks) for rank in range(per_node)]
        touched |= set(manifest.locate(order.ids(np.concatenate(positions)))[0].tolist())
    own = {
        position % order.streams for position in range(lcm(order.streams, job.ranks)) if position % job.ranks < per_node
    }
    part = f"the first of {nodes:,} nodes reads {len(touched):,} of {len(manifest.counts):,} shards in {steps:,} steps"
    if len(own) <= 1.5 * order.streams / nodes:
        yield Finding(part)
    elif order.streams < job.ranks and order.streams < job.streams:
        yield Finding(part, f"data.block={max(1, manifest.samples // job.streams)} keeps all {job.streams} streams")
    else:
        divisors = [r for r in range(1, job.streams + 1) if job.streams % r == 0 and r <= job.ranks]
        multiple = -(-job.streams // job.ranks) * job.ranks
        fix = f"{divisors[-1]:,} ranks, or data.streams={multiple}, so that ranks divide streams and each keeps its own"
        yield Finding(part, fix)


def _classes(manifest: Manifest, job: Job) -> Iterator[Finding]:
    sizes = class_sizes(manifest)
    (text,) = class_lines(manifest)
    if sizes is None:
        yield Finding(text, "make the shards again with labels: this job needs them" if job.labels else "")
    elif (sizes == 0).any() and job.labels:
        yield Finding(text, "a class without samples cannot be learned; take it out of the source or get its pictures")
    else:
        yield Finding(text)


def _checksums(manifest: Manifest) -> Iterator[Finding]:
    missing = sum(shard.sha256 is None for shard in manifest.file.shards)
    if missing:
        source, options = manifest.file.source.get("path", manifest.folder), manifest.file.options
        words = ["--checksums", f"--label {options.get('label') or 'none'}"]
        words += [f"--image {options['image']}"] if options.get("image") else []
        words += ["--classes FILE"] if manifest.classes else []
        words += ["--to NEW_FOLDER"] if Path(source).resolve() != manifest.folder.resolve() else []
        fix = f"python -m data_prep index {source} {' '.join(words)}"
        yield Finding(f"{missing:,} shards have no checksums, so that a changed one would not be noticed", fix)
