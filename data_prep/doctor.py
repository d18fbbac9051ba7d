"""Checks whether a data set suits a job with given ranks, workers and batch. Every problem is reported with its fix."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm
from pathlib import Path

import numpy as np

from data_prep.images import SIGNATURE_BYTES, sniff
from data_prep.info import class_lines, class_sizes, known_size
from data_prep.reports import SHOWN
from data_prep.shard_list import ShardList
from data_prep.tar import BLOCK, members
from data_prep.verify import check_members
from mimscale.data.manifest import Manifest, shard_faults
from mimscale.data.order import Order, rank_positions
from mimscale.errors import UserError

SMALL_SHARD, LARGE_SHARD = 32 << 20, 2 << 30  # bytes; in between, reads are sequential and a lost shard is cheap
MAX_SIZE_RATIO = 1.5  # of the largest shard to the smallest; above, it is hard to choose the size of a cache
VERIFY = "python -m data_prep verify"
MAX_POSITIONS = 2_000_000  # of a node, for which its shards are counted


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
    """One line of the report. fix: what to do; "" if nothing is to be done."""

    text: str
    fix: str = ""


def examine(folder: Path, job: Job) -> list[Finding]:
    """Raises UserError if there is no readable data set."""
    manifest = Manifest.load(folder, check_shards=False)
    return [
        *_exist(manifest),
        *map(Finding, known_size(manifest)),
        *_batch(manifest, job),
        *_left_out(manifest),
        *_shards(manifest),
        *_rest(manifest),
        *_workers(manifest, job),
        *_locality(manifest, job),
        *_classes(manifest, job),
        *_checksums(manifest),
    ]


def _exist(manifest: Manifest) -> Iterator[Finding]:
    text = f"{manifest.samples:,} samples in {len(manifest.counts):,} shards"
    faults = shard_faults(manifest.location, manifest.file.shards)
    if not faults:
        yield Finding(f"{text}; all exist with their lengths")
        return
    shown = "; ".join(f"{name} {state}" for name, state in list(faults.items())[:SHOWN])
    more = f"; and {len(faults) - SHOWN:,} more" if len(faults) > SHOWN else ""
    yield Finding(
        f"{text}, of which {len(faults):,} are bad: {shown}{more}", f"python -m data_prep verify {manifest.folder}"
    )


def _left_out(manifest: Manifest) -> Iterator[Finding]:
    if manifest.file.bad_shards:
        yield Finding(f"{len(manifest.file.bad_shards):,} bad shards were left out when the set was indexed, see info")


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
        yield Finding(
            f"{text}: below {SMALL_SHARD >> 20} MiB the file system spends most of its time opening them", again
        )
    elif sizes.max() > MAX_SIZE_RATIO * sizes.min():
        yield Finding(f"{text}: the largest is {sizes.max() / sizes.min():.1f} times the smallest", again)
    else:
        yield Finding(text)


def _rest(manifest: Manifest) -> Iterator[Finding]:
    """Images behind the last one of the index: an index that is older than the shard, or that ended at zero blocks.

    They may also have been left out on purpose, as the headers of the whole shard show.
    """
    ends = np.cumsum(manifest.counts)
    names = [shard.name for shard in manifest.file.shards]
    bad: list[Finding] = []
    for name, count, end in zip(names, manifest.counts, ends, strict=True):
        last = slice(int(end - count), int(end))
        tail = int((manifest.offsets[last] + -(-manifest.sizes[last] // BLOCK) * BLOCK).max())
        try:
            with ShardList(manifest.location, [name]).open(name) as file:
                where = f"{manifest.location}/{name}"
                more = sum(
                    sniff(member.start[:SIGNATURE_BYTES]) is not None
                    for member in members(file, where, tail, archive=0)
                )
                if more and not check_members(manifest, file, where, range(last.start, last.stop)):
                    more = 0
        except (OSError, UserError) as error:
            bad.append(Finding(str(error), f"{VERIFY} {manifest.folder}"))
            continue
        if more:
            text = f"'{name}' holds {more:,} images behind the last one of the index"
            bad.append(Finding(text, "write the index again"))
    yield from bad[:SHOWN]
    if len(bad) > SHOWN:
        yield Finding(f"{len(bad) - SHOWN:,} more shards are bad", f"{VERIFY} {manifest.folder}")


def _workers(manifest: Manifest, job: Job) -> Iterator[Finding]:
    """mimscale splits samples evenly for any number of shards; a plain WebDataset pipeline splits whole shards."""
    readers, shards = job.ranks * max(1, job.workers), len(manifest.counts)
    uneven = "" if shards % readers == 0 else ", which a plain WebDataset pipeline could not split evenly"
    yield Finding(
        f"{job.ranks:,} ranks x {job.workers} workers: every rank gets equal batches, every sample once per epoch "
        f"({shards:,} shards for {readers:,} readers{uneven})"
    )


def _locality(manifest: Manifest, job: Job) -> Iterator[Finding]:
    """Number of shards that one node reads in an epoch: the load of the file system, and the content of its cache."""
    order = Order(manifest, 0, job.streams, job.block)
    nodes = -(-job.ranks // job.ranks_per_node)
    per_node = min(job.ranks_per_node, job.ranks)
    if job.global_batch % job.ranks or nodes == 1:
        return
    steps = max(1, min(manifest.samples // job.global_batch, MAX_POSITIONS // (job.global_batch // nodes or 1)))
    shards: set[int] = set()
    for step in range(steps):
        positions = [rank_positions(step, job.global_batch, rank, job.ranks) for rank in range(per_node)]
        shards |= set(manifest.locate(order.ids(np.concatenate(positions)))[0].tolist())
    streams = {
        position % order.streams for position in range(lcm(order.streams, job.ranks)) if position % job.ranks < per_node
    }
    text = f"the first of {nodes:,} nodes reads {len(shards):,} of {len(manifest.counts):,} shards in {steps:,} steps"
    if len(streams) <= 1.5 * order.streams / nodes:
        yield Finding(text)
    elif order.streams < job.ranks and order.streams < job.streams:
        yield Finding(text, f"data.block={max(1, manifest.samples // job.streams)} keeps all {job.streams} streams")
    else:
        divisors = [r for r in range(1, job.streams + 1) if job.streams % r == 0 and r <= job.ranks]
        multiple = -(-job.streams // job.ranks) * job.ranks
        fix = f"{divisors[-1]:,} ranks, or data.streams={multiple}, so that every rank has streams of its own"
        yield Finding(text, fix)


def _classes(manifest: Manifest, job: Job) -> Iterator[Finding]:
    sizes = class_sizes(manifest)
    (text,) = class_lines(manifest)
    if sizes is None:
        yield Finding(text, "make the shards again with labels: this job needs them" if job.labels else "")
    elif (sizes == 0).any() and job.labels:
        yield Finding(text, "a class without samples cannot be learned; remove it from the source or add images")
    else:
        yield Finding(text)


def quoted(word: object) -> str:
    """As a shell reads it: names in a manifest are those of others."""
    return shlex.quote(str(word))


def _checksums(manifest: Manifest) -> Iterator[Finding]:
    missing = sum(shard.sha256 is None for shard in manifest.file.shards)
    if missing:
        source, options = manifest.file.source.get("path", manifest.folder), manifest.file.options
        words = ["--checksums", f"--label {quoted(options.get('label') or 'none')}"]
        words += [f"--image {quoted(options['image'])}"] if options.get("image") else []
        words += ["--skip-unlabelled"] if options.get("skip_unlabelled") else []
        words += [f"--files {quoted(options['files'])}"] if options.get("files") else []
        words += ["--skip-bad"] if manifest.file.bad_shards else []
        words += ["--classes FILE"] if manifest.classes else []
        words += ["--to NEW_FOLDER"] if Path(source).resolve() != manifest.folder.resolve() else []
        fix = f"python -m data_prep index {quoted(source)} {' '.join(words)}"
        yield Finding(f"{missing:,} shards have no checksums, so a changed shard would not be noticed", fix)
