"""Carries a plan out: shard by shard, restartable, in any number of processes on any number of nodes.

A shard is written under a temporary name, synced and renamed; then its sidecar (shard-000000.json) says what it is. A
shard is finished if its sidecar bears the hash of the plan and the file has the length that the sidecar says. The same
plan gives the same bytes.
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
from pathlib import Path

from data_prep.finish import PLAN, PlanFile, Sidecar, finish, finished, read_plan, shard_path
from data_prep.pictures import Pictures, stored
from data_prep.plan import Item, Plan
from data_prep.read import Read, reader
from data_prep.tar import BLOCK, RECORD, padded
from mimscale.data.decode import BadImage
from mimscale.errors import UserError
from mimscale.files.atomic import atomic_stream, atomic_write

TRIED = 500  # pictures from which the time is estimated


def open_folder(folder: Path, plan: Plan) -> None:
    """Claim the destination for this plan. Raises UserError if it holds anything else."""
    source = plan.source
    mine = PlanFile(
        plan=plan.hash,
        options=plan.options,
        samples=len(plan.items),
        shards=plan.shards,
        classes=source.classes,
        description=source.description,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / PLAN).exists():
            others = [name for name in os.listdir(folder) if not name.startswith(f".{PLAN}")]
            if others and not (folder / PLAN).exists():  # another part may just have claimed it
                raise UserError(f"destination '{folder}' already holds '{others[0]}'; choose an empty or new folder")
            atomic_write(folder / PLAN, (mine.model_dump_json(indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"destination '{folder}' cannot be used: {error}") from None
    found = read_plan(folder)
    if found.plan != mine.plan:
        pairs = {name: (getattr(found, name), getattr(mine, name)) for name in ("samples", "shards")}
        pairs |= {f"--{k.replace('_', '-')}": (found.options.get(k), v) for k, v in plan.options.items()}
        changed = ", ".join(f"{k} {old} -> {new}" for k, (old, new) in pairs.items() if old != new)
        reason = changed or "other names, sizes or labels in the source"
        raise UserError(f"destination '{folder}' was made differently ({reason}); choose another folder or delete it")


@dataclass
class Contents:
    """What went into a shard; grows while `shard_bytes` runs."""

    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    changed: Counter[str] = field(default_factory=Counter)


def shard_bytes(items: list[Item], read: Read, labelled: bool, how: Pictures, contents: Contents) -> Iterator[bytes]:
    """A shard, piece by piece. Nothing in it depends on when, where or by whom it is written."""
    length = 0
    for item in items:
        try:
            picture = stored(read(item), how)
        except BadImage as error:
            contents.left_out[item.key] = str(error)
            continue
        members = {picture.extension: picture.data}
        if labelled:
            members["cls"] = str(item.label).encode()
            contents.labels.append(item.label)
        for extension, data in sorted(members.items()):
            info = tarfile.TarInfo(f"{item.key}.{extension}")
            info.size = len(data)
            yield info.tobuf(tarfile.USTAR_FORMAT)
            yield data
            yield bytes(padded(info.size) - info.size)
            if extension == picture.extension:
                contents.offsets.append(length + BLOCK)
                contents.sizes.append(info.size)
            length += BLOCK + padded(info.size)
        if picture.change:
            contents.changed[picture.change] += 1
    yield bytes(padded(length + 2 * BLOCK, RECORD) - length)


def write_shard(folder: Path, number: int, items: list[Item], labelled: bool, plan_hash: str, how: Pictures) -> Sidecar:
    """Write one shard and its sidecar. Raises UserError if a source file cannot be read or has changed, and where
    another process writes the same shard: each takes the other's unfinished file for a leftover.
    """
    path = shard_path(folder, number)
    for leftover in folder.glob(f".{path.stem}.*.tmp*"):
        leftover.unlink(missing_ok=True)
    digest, length, contents = hashlib.sha256(), 0, Contents()
    try:
        with atomic_stream(path, buffering=1 << 20) as file, reader() as read:
            for piece in shard_bytes(items, read, labelled, how, contents):
                digest.update(piece)
                length += file.write(piece)
    except FileNotFoundError:
        raise UserError(f"'{path}' is being written by another process too; let one of them go on") from None
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


def unfinished(plan: Plan, folder: Path, part: tuple[int, int] = (0, 1)) -> list[int]:
    """The shards with number % part[1] == part[0] that are still to be written. Opens the folder; raises UserError."""
    open_folder(folder, plan)
    mine = range(part[0], plan.shards, part[1])
    todo = [number for number in mine if finished(folder, number, plan.hash) is None]
    if len(todo) < len(mine):
        print(f"{len(mine) - len(todo)} of {len(mine)} shards were already written; skipped", file=sys.stderr)
    return todo


def write(
    plan: Plan, folder: Path, todo: list[int], *, jobs: int = 1, done: Callable[[int], None] = lambda samples: None
) -> list[int]:
    """Write the shards of `todo`, and, if then all of the plan are finished, the manifest.

    done: called after each shard with the number of its samples. Returns the shards that are still missing.
    """
    arguments = ((folder, number, plan.shard(number), plan.labelled, plan.hash, plan.pictures) for number in todo)
    if jobs == 1 or len(todo) < 2:
        for argument in arguments:
            write_shard(*argument)
            done(len(argument[2]))
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(jobs, len(todo)), mp_context=spawn, initializer=_die_with_parent) as pool:
            futures = {pool.submit(write_shard, *argument): len(argument[2]) for argument in arguments}
            try:
                for future in as_completed(futures):
                    future.result()
                    done(futures[future])
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return finish(folder)


def estimate(plan: Plan, jobs: int) -> tuple[int, float]:
    """(pictures tried, seconds that `jobs` processes need to read and make all shards, without writing them).

    Raises UserError as `write_shard` does.
    """
    tried = plan.items[:: max(1, len(plan.items) // TRIED)][:TRIED]
    start = time.perf_counter()
    with reader() as read:
        digest = hashlib.sha256()
        for piece in shard_bytes(tried, read, plan.labelled, plan.pictures, Contents()):
            digest.update(piece)
    return len(tried), (time.perf_counter() - start) * len(plan.items) / len(tried) / min(jobs, plan.shards)


def _die_with_parent() -> None:
    """A killed run must not leave writers behind that a restart would race with."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
