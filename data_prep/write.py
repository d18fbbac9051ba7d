"""Carries a plan out: shard by shard, restartable, in any number of processes on any number of nodes.

A shard is written under a temporary name, synced and renamed; then its sidecar (shard-000000.json) says what it is. A
shard is finished if its sidecar bears the hash of the plan and the file has the length that the sidecar says. Whoever
finds all shards finished writes the manifest. The same plan gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from data_prep.plan import BLOCK, END, Item, Plan, padded
from mimscale.data.manifest import MANIFEST, Shard, save_manifest, write_atomic
from mimscale.errors import UserError

PLAN = "plan.json"


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.tar"


def open_folder(folder: Path, plan: Plan) -> None:
    """Claim the destination for this plan. Raises UserError if it holds anything else."""
    mine = {"plan": plan.hash, "options": plan.options, "samples": len(plan.items), "shards": plan.shards}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / PLAN).exists():
            others = [name for name in os.listdir(folder) if not name.startswith(f".{PLAN}")]
            if others and not (folder / PLAN).exists():  # another part may just have claimed it
                raise UserError(f"destination '{folder}' already holds '{others[0]}'; choose an empty or new folder")
            write_atomic(folder / PLAN, (json.dumps(mine, indent=1) + "\n").encode())
        found = json.loads((folder / PLAN).read_bytes())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"destination '{folder}' cannot be used: {error}") from None
    if found != mine:
        pairs = {**{k: (found.get(k), mine[k]) for k in ("samples", "shards")}}
        pairs |= {f"--{k.replace('_', '-')}": (found["options"].get(k), v) for k, v in plan.options.items()}
        changed = ", ".join(f"{k} {old} -> {new}" for k, (old, new) in pairs.items() if old != new)
        reason = changed or "other names, sizes or labels in the source"
        raise UserError(f"destination '{folder}' was made differently ({reason}); choose another folder or delete it")


def finished(folder: Path, number: int, plan_hash: str) -> Shard | None:
    """What the sidecar says, if the shard is whole and of this plan."""
    path = shard_path(folder, number)
    try:
        sidecar = json.loads(path.with_suffix(".json").read_bytes())
        if sidecar.pop("plan") != plan_hash:
            return None
        shard = Shard.model_validate(sidecar)
        return shard if path.stat().st_size == shard.bytes else None
    except (OSError, ValueError, KeyError, ValidationError):
        return None


def write_shard(folder: Path, number: int, items: list[Item], labelled: bool, plan_hash: str) -> Shard:
    """Write one shard and its sidecar. Raises UserError if a source file cannot be read or has changed."""
    path = shard_path(folder, number)
    for leftover in folder.glob(f".{path.stem}.*.tmp"):
        leftover.unlink(missing_ok=True)
    temporary = folder / f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp"
    digest, length = hashlib.sha256(), 0
    try:
        with open(temporary, "wb", buffering=1 << 20) as file, _source() as read:
            for item in items:
                member = _member(f"{item.key}.{item.extension}", read(item))
                if labelled:
                    member += _member(f"{item.key}.cls", str(item.label).encode())
                digest.update(member)
                length += file.write(member)
            digest.update(bytes(END))
            length += file.write(bytes(END))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    shard = Shard(name=path.name, count=len(items), bytes=length, sha256=digest.hexdigest())
    sidecar = {"plan": plan_hash, **shard.model_dump()}
    write_atomic(path.with_suffix(".json"), (json.dumps(sidecar, indent=1) + "\n").encode())
    return shard


def _member(name: str, data: bytes) -> bytes:
    """Header and padded contents, with nothing in them that depends on when or by whom they are written."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    header = info.tobuf(tarfile.USTAR_FORMAT)
    assert len(header) == BLOCK, name
    return header + data + bytes(padded(len(data)) - len(data))


@contextmanager
def _source() -> Iterator[Callable[[Item], bytes]]:
    """A reader of items that keeps the last file open: a big archive is opened once."""
    opened: tuple[str, int] | None = None

    def read(item: Item) -> bytes:
        nonlocal opened
        try:
            if opened is None or opened[0] != item.path:
                if opened is not None:
                    os.close(opened[1])
                    opened = None
                opened = item.path, os.open(item.path, os.O_RDONLY)
            data = os.pread(opened[1], item.size, item.offset)
            grown = item.offset == 0 and os.fstat(opened[1]).st_size != item.size
        except OSError as error:
            raise UserError(f"source file '{item.path}' cannot be read: {error.strerror}") from None
        if len(data) != item.size or grown:
            raise UserError(f"source file '{item.path}' has changed since it was listed; start again")
        return data

    try:
        yield read
    finally:
        if opened is not None:
            os.close(opened[1])


def unfinished(plan: Plan, folder: Path, part: tuple[int, int] = (0, 1)) -> list[int]:
    """The shards with number % part[1] == part[0] that are still to be written. Opens the folder; raises UserError."""
    open_folder(folder, plan)
    mine = range(part[0], plan.shards, part[1])
    todo = [number for number in mine if finished(folder, number, plan.hash) is None]
    if len(todo) < len(mine):
        print(f"{len(mine) - len(todo)} of {len(mine)} shards were already written; skipped", file=sys.stderr)
    return todo


def write(
    plan: Plan, folder: Path, todo: list[int], *, jobs: int = 1, done: Callable[[Shard], None] = lambda shard: None
) -> bool:
    """Write the shards of `todo`, and, if then all of the plan are finished, the manifest.

    done: called after each shard. Returns whether the data set is complete.
    """
    arguments = ((folder, number, plan.shard(number), plan.labelled, plan.hash) for number in todo)
    if jobs == 1 or len(todo) < 2:
        for argument in arguments:
            done(write_shard(*argument))
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(jobs, len(todo)), mp_context=spawn, initializer=_die_with_parent) as pool:
            futures = [pool.submit(write_shard, *argument) for argument in arguments]
            try:
                for future in as_completed(futures):
                    done(future.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    shards = [shard for n in range(plan.shards) if (shard := finished(folder, n, plan.hash)) is not None]
    if len(shards) < plan.shards:
        return False
    if not (folder / MANIFEST).exists():
        save_manifest(
            folder,
            shards=shards,
            index=plan.index(),
            labels=plan.labels(),
            classes=plan.source.classes,
            seed=plan.seed,
            options=plan.options,
            source=plan.source.description,
        )
    return True


def _die_with_parent() -> None:
    """A killed run must not leave writers behind that a restart would race with."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
