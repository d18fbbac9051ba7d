"""Saving beside the training: the step waits for a copy to host memory, a thread does the rest.

One save at a time. Every rank's thread writes its shard; that all have done so is agreed on by the loop's own per-step
reduction (`poll`), so no rank ever waits for another's disk; then rank 0's thread commits and prunes. A disk
that is full or slow costs warnings and tries; when `patience_s` is over the save is given up, the training goes on, and
what was saved before stays. The threads use no collectives and end with their save, so none lives while loader workers
are forked.
"""

from __future__ import annotations

import math
import shutil
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mimscale.checkpoint import format as checkpoint
from mimscale.checkpoint.config import CheckpointConfig
from mimscale.checkpoint.host_buffer import HostBuffer
from mimscale.distributed.coordination import Coordinator
from mimscale.errors import Stopped, warn

_ENTRY = struct.Struct("<q32s")  # size in bytes and sha256 of a shard; size -1: not written
_NEVER = 2**62  # has no say in a minimum


@dataclass
class _Job:
    """The save under way, as this rank sees it. `ready`: all shards are on disk, and rank 0 commits."""

    step: int
    meta: Mapping[str, Any]
    temporary: Path
    thread: threading.Thread | None = None
    entry: tuple[int, bytes] | None = None
    failure: str | None = None
    ready: bool = False
    committed: bool = False
    stalled_s: float = 0.0
    start_s: float = field(default_factory=time.monotonic)


class AsyncCheckpointWriter:
    """Made once, before the loader's workers start: allocates the buffers and exchanges who holds what. Collective.

    tensors: "kind|name|start" -> live 1-D tensor of this rank; every save brings the same ones in their current values.
    unchanged: called on rank 0 before anything is renamed or removed; raises Stopped where another start took over.
    note: told of each event on rank 0, from the training's thread.
    alive: told, while a step waits for a save, whenever some rank's disk has gone on.
    """

    def __init__(
        self,
        root: Path,
        coordinator: Coordinator,
        config: CheckpointConfig,
        tensors: Mapping[str, Tensor],
        unchanged: Callable[[], None] = lambda: None,
        note: Callable[..., None] = lambda name, **values: None,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._root, self._coordinator, self._config = root, coordinator, config
        self._unchanged, self._note, self._alive = unchanged, note, alive
        self._copy = HostBuffer(tensors)
        everyone = coordinator.gather(checkpoint.fragments(tensors))
        self._fragments = everyone if coordinator.rank == 0 else []  # at 512 ranks of ZeRO-3 some 100 MB
        self._job: _Job | None = None
        self._number = 0  # saves begun; the same on all ranks, like all that `poll` decides by
        self._written = self._handled = 0  # this rank's last shard on disk or given up; rank 0's last save dealt with
        self._tries = 0

    @property
    def bytes(self) -> int:
        """Size of this rank's file in each checkpoint."""
        return self._copy.bytes

    # ---------------------------------------------------------------------------------------------- the loop's calls

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Copy, and go on writing in the background. Collective.

        Where the save before is still being written, waits up to `wait_s`, then leaves this one out, with a note.
        """
        if self.wait_for_writes(self._config.wait_s) is None:
            assert self._job is not None
            late_s = time.monotonic() - self._job.start_s
            if self._coordinator.rank == 0:
                self._warn(f"step {step} is not saved: step {self._job.step} is not yet written after {late_s:.0f} s")
            self._note("save_skipped", at=step, busy_with=self._job.step)
            return
        start_s = time.perf_counter()
        self._copy.fill(tensors)
        name = self._coordinator.broadcast(f".tmp-{checkpoint.step_folder(self._root, step).name}-{time.time_ns():x}")
        self._number += 1
        job = self._job = _Job(step, meta, self._root / name)
        job.stalled_s = time.perf_counter() - start_s
        self._start(job, self._write)

    def poll(self, stop_requested: bool = False) -> bool:
        """Once per step: go on with the save under way. Waits for nothing; all ranks do the same.

        The one agreement of a step carries the loop's flag too: returns whether any rank had raised it a step ago.
        """
        handled = self._handled if self._coordinator.rank == 0 else _NEVER
        asked, *least = self._coordinator.agree(stop_requested, -self._written, -handled)
        job, (written, handled) = self._job, (-number for number in least)
        if job is not None and not job.ready and written >= self._number:
            self._gather(job)
        if job is not None and handled >= self._number:
            self._finish(job)
        return bool(asked)

    def wait_for_writes(self, limit_s: float | None = None) -> bool | None:
        """Wait until the save under way is on disk (True) or given up (False); None after `limit_s`. Collective."""
        job = self._job
        if job is None:
            return True
        end_s = time.monotonic() + (math.inf if limit_s is None else limit_s)
        if not job.ready:
            if not self._ended(job, end_s):
                return None
            self._gather(job)
        if not self._ended(job, end_s):
            return None
        job.committed = self._coordinator.broadcast(job.committed)
        self._finish(job)
        return job.committed

    def _ended(self, job: _Job, end_s: float) -> bool:
        """Wait for the threads of all ranks, at most until `end_s` on one of them. Collective."""
        before, pause_s = None, 0.01
        while True:
            assert job.thread is not None
            job.thread.join(max(0.0, min(pause_s, end_s - time.monotonic())))
            ended, late = not job.thread.is_alive(), time.monotonic() >= end_s
            ranks = self._coordinator.gather((ended, late, self._copy.written, self._tries))
            if all(ended for ended, *_ in ranks):
                return True
            if any(late for _, late, *_ in ranks):
                return False
            if ranks != before:
                self._alive()
            before, pause_s = ranks, min(2 * pause_s, 1.0)

    # ------------------------------------------------------------------------------------------------------- plumbing

    def _start(self, job: _Job, work: Callable[[_Job], None]) -> None:
        job.thread = threading.Thread(target=work, args=(job,), name="save", daemon=True)
        job.thread.start()

    def _gather(self, job: _Job) -> None:
        """Every rank's size and sha256 to rank 0, which commits, or drops the save if one has failed. Collective."""
        job.ready = True
        entries = [
            _ENTRY.unpack(item) for item in self._coordinator.gather_bytes(_ENTRY.pack(*(job.entry or (-1, b""))))
        ]
        failed = [rank for rank, (size, _) in enumerate(entries) if size < 0]
        if failed:
            job.failure = job.failure or f"rank {failed[0]} could not write its shard"
        if self._coordinator.rank != 0:
            return
        world = self._coordinator.world
        shards = [
            {"file": checkpoint.shard_name(rank, world), "bytes": size, "sha256": digest.hex(), "fragments": rows}
            for rank, ((size, digest), rows) in enumerate(zip(entries, self._fragments, strict=True))
        ]
        self._start(job, lambda job: self._drop(job) if failed else self._commit(job, shards))

    def _finish(self, job: _Job) -> None:
        self._job = None
        if self._coordinator.rank != 0:
            return
        seconds = {"stalled_s": round(job.stalled_s, 4), "written_s": round(time.monotonic() - job.start_s, 3)}
        if job.committed:
            self._note("saved", at=job.step, bytes_rank0=self._copy.bytes, **seconds)
        else:
            self._warn(f"step {job.step} could not be saved: {job.failure}; the checkpoints before it are untouched")
            self._note("save_failed", at=job.step, why=job.failure, **seconds)

    # ------------------------------------------------------------------------------------------------- in the thread

    def _write(self, job: _Job) -> None:
        path = job.temporary / checkpoint.shard_name(self._coordinator.rank, self._coordinator.world)

        def attempt() -> None:
            job.temporary.mkdir(parents=True, exist_ok=True)
            size, digest = self._copy.write(path)
            job.entry = (size, bytes.fromhex(digest))

        self._patiently(job, attempt)
        self._written = self._number

    def _commit(self, job: _Job, shards: list[dict[str, Any]]) -> None:
        final = checkpoint.step_folder(self._root, job.step)

        def attempt() -> None:
            self._unchanged()
            if job.temporary.exists():  # else the rename was done, and only what follows it failed
                checkpoint.commit(job.temporary, final, shards, job.meta)
            job.committed = True

        def tidy() -> None:
            self._unchanged()
            checkpoint.forget_after(self._root, job.step)
            checkpoint.prune(self._root, self._config.keep, self._config.keep_every)

        self._patiently(job, attempt)
        if job.committed:
            self._patiently(job, tidy)
        else:
            self._drop(job)
        self._handled = self._number

    def _drop(self, job: _Job) -> None:
        shutil.rmtree(job.temporary, ignore_errors=True)
        self._handled = self._number

    def _patiently(self, job: _Job, attempt: Callable[[], None]) -> None:
        """Try until it succeeds or `patience_s` is over. What went wrong ends up in `job.failure`."""
        end_s, pause_s = time.monotonic() + self._config.patience_s, 1.0
        while True:
            self._tries += 1
            try:
                attempt()
                return
            except Stopped as error:
                job.failure = str(error)
                return
            except Exception as error:
                job.failure = f"rank {self._coordinator.rank}: {type(error).__name__}: {error}"
                retried = isinstance(error, OSError) and time.monotonic() + pause_s < end_s
                self._warn(f"step {job.step}: {error}; {f'trying again in {pause_s:g} s' if retried else 'given up'}")
                if not retried:
                    return
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 30.0)

    def _warn(self, text: str) -> None:
        warn(f"checkpoint: rank {self._coordinator.rank}: {text}")
