"""Writes the shards of a plan, with any number of processes on any number of nodes; can be interrupted and repeated.

A shard is written under a temporary name, synced and renamed; then its sidecar (shard-000000.json) is written. A shard
is finished if its sidecar has the hash of the plan and the file has the length that the sidecar gives. The same plan
gives the same bytes.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.images import ImageOptions, process_image
from data_prep.item_reader import ItemReader, Read
from data_prep.plan import Item, ShardPlan
from data_prep.tar import BLOCK, RECORD, padded_size
from data_prep.write_manifest import PLAN, PlanFile, Sidecar, read_plan, read_sidecar, shard_path, write_manifest
from mimscale.data.decode import BadImage
from mimscale.data.manifest import LISTED
from mimscale.errors import UserError
from mimscale.files.atomic import atomic_stream, atomic_write

ESTIMATE_IMAGES = 500  # number of images that `estimate` processes


def reserve_folder(folder: Path, plan: ShardPlan) -> None:
    """Reserve the destination for this plan. Raises UserError if it holds anything else."""
    source = plan.source
    mine = PlanFile(
        plan=plan.hash,
        options=plan.options,
        samples=len(plan.items),
        shards=plan.shards,
        classes=source.classes,
        description=source.description,
        skipped=dict(source.skipped),
        left_out=dict(islice(source.left_out.items(), LISTED)),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / PLAN).exists():
            others = [name for name in os.listdir(folder) if not name.startswith(f".{PLAN}")]
            if others and not (folder / PLAN).exists():  # another part may have reserved it just now
                raise UserError(f"destination '{folder}' already holds '{others[0]}'; choose an empty or new folder")
            atomic_write(folder / PLAN, (mine.model_dump_json(indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"destination '{folder}' cannot be used: {error}") from None
    found = read_plan(folder)
    if found.plan != mine.plan:
        pairs = {name: (getattr(found, name), getattr(mine, name)) for name in ("samples", "shards")}
        pairs |= {f"--{k.replace('_', '-')}": (found.options.get(k), v) for k, v in plan.options.items()}
        changed = ", ".join(f"{k} {old} -> {new}" for k, (old, new) in pairs.items() if old != new)
        reason = changed or "other names, sizes, labels or pixels in the source"
        raise UserError(f"destination '{folder}' was made differently ({reason}); choose another folder or delete it")


@dataclass
class Contents:
    """Contents of a shard; filled while `shard_bytes` runs."""

    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    changed: Counter[str] = field(default_factory=Counter)


def shard_bytes(
    items: list[Item], read: Read, labelled: bool, options: ImageOptions, contents: Contents
) -> Iterator[bytes]:
    """The bytes of a shard, in pieces. They do not depend on the time, the process or the machine."""
    length = 0
    for item in items:
        try:
            image = process_image(read(item), options)
        except BadImage as error:
            contents.left_out[item.key] = str(error)
            continue
        members = {image.extension: image.data}
        if labelled:
            members["cls"] = str(item.label).encode()
            contents.labels.append(item.label)
        for extension, data in sorted(members.items()):
            info = tarfile.TarInfo(f"{item.key}.{extension}")
            info.size = len(data)
            yield info.tobuf(tarfile.USTAR_FORMAT)
            yield data
            yield bytes(padded_size(info.size) - info.size)
            if extension == image.extension:
                contents.offsets.append(length + BLOCK)
                contents.sizes.append(info.size)
            length += BLOCK + padded_size(info.size)
        if image.change:
            contents.changed[image.change] += 1
    yield bytes(padded_size(length + 2 * BLOCK, RECORD) - length)


def write_shard(
    folder: Path,
    number: int,
    items: list[Item],
    labelled: bool,
    plan_hash: str,
    options: ImageOptions,
    reader: ItemReader | None = None,
) -> Sidecar:
    """Write one shard and its sidecar. reader: of the shards that one process writes, in their order.

    Raises UserError if a source file cannot be read or has changed, or if another process writes the same shard: each
    removes the unfinished file of the other as a leftover.
    """
    path = shard_path(folder, number)
    for leftover in folder.glob(f".{path.stem}.*.tmp*"):
        leftover.unlink(missing_ok=True)
    digest, length, contents = hashlib.sha256(), 0, Contents()
    reader = ItemReader() if reader is None else reader
    try:
        with atomic_stream(path, buffering=1 << 20) as file, reader.shard(items) as read:
            for piece in shard_bytes(items, read, labelled, options, contents):
                digest.update(piece)
                length += file.write(piece)
    except FileNotFoundError:
        raise UserError(f"'{path}' is being written by another process too; run only one of them") from None
    sidecar = Sidecar(
        plan=plan_hash,
        count=len(contents.offsets),
        bytes=length,
        sha256=digest.hexdigest(),
        offsets=contents.offsets,
        sizes=contents.sizes,
        labels=contents.labels if labelled else None,
        left_out=contents.left_out,
        changed=dict(contents.changed),
    )
    atomic_write(path.with_suffix(".json"), (sidecar.model_dump_json() + "\n").encode())
    return sidecar


def unfinished(plan: ShardPlan, folder: Path, part: tuple[int, int] = (0, 1)) -> list[int]:
    """The numbers n of shards with n % part[1] == part[0] that are not written yet. Reserves the folder.

    Raises UserError.
    """
    reserve_folder(folder, plan)
    mine = range(part[0], plan.shards, part[1])
    todo = [number for number in mine if read_sidecar(folder, number, plan.hash) is None]
    if len(todo) < len(mine):
        print(f"{len(mine) - len(todo)} of {len(mine)} shards were already written; skipped", file=sys.stderr)
    return todo


def write(
    plan: ShardPlan, folder: Path, todo: list[int], *, jobs: int = 1, done: Callable[[int], None] = lambda samples: None
) -> list[int]:
    """Write the shards of `todo`, and the manifest if all shards of the plan are finished then.

    done: called after each shard with its number of samples. Returns the numbers of the shards that are still missing.
    """
    arguments = ((folder, number, plan.shard(number), plan.labelled, plan.hash, plan.images) for number in todo)
    if jobs == 1 or len(todo) < 2:
        reader = ItemReader(plan.source.root)
        for argument in arguments:
            write_shard(*argument, reader)
            done(len(argument[2]))
        reader.close()
    else:
        spawn = multiprocessing.get_context("spawn")
        root = plan.source.root
        with ProcessPoolExecutor(min(jobs, len(todo)), spawn, initializer=_begin_worker, initargs=(root,)) as pool:
            futures = {pool.submit(_write_in_worker, *argument): len(argument[2]) for argument in arguments}
            try:
                for future in as_completed(futures):
                    future.result()
                    done(futures[future])
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return write_manifest(folder)


def estimate(plan: ShardPlan, jobs: int) -> tuple[int, float]:
    """(number of images processed, estimated seconds for `jobs` processes to make all shards, without writing them).

    Raises UserError as `write_shard` does.
    """
    stride = max(1, len(plan.items) // ESTIMATE_IMAGES) if plan.source.runs is None else 1
    items = plan.items[::stride][:ESTIMATE_IMAGES]
    start = time.perf_counter()
    with ItemReader(plan.source.root).shard(items) as read:
        digest = hashlib.sha256()
        for piece in shard_bytes(items, read, plan.labelled, plan.images, Contents()):
            digest.update(piece)
    seconds = (time.perf_counter() - start) * len(plan.items) / len(items) / min(jobs, plan.shards)
    return len(items), seconds


_reader: ItemReader | None = None  # of a worker


def _begin_worker(root: str) -> None:
    global _reader
    _reader = ItemReader(root)
    _exit_with_parent()


def _write_in_worker(*arguments: Any) -> Sidecar:
    shard: Callable[..., Sidecar] = write_shard
    return shard(*arguments, _reader)


def _exit_with_parent() -> None:
    """Ends this worker with its parent: otherwise a restarted run would race with the workers of a killed one."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
