"""Disks that are full, slow, read-only or broken, while the run goes on."""

from __future__ import annotations

import errno
import shutil
import time

from mimscale.checkpoint import format as checkpoint
from tests.faults.kinds._kind import Moments, fault, soon
from tests.faults.lab import Lab, Missed, Run, mounted, unmount
from tests.faults.layer import CHANGES, SLOW


def refused(lab: Lab, run: Run, error: int) -> str:
    """Wait until saves fail with this errno; for one try, or until a save was given up."""
    briefly = lab.random.random() < 0.5
    run.until(lambda: run.said(f"Errno {error}"), "a save that fails")
    if not briefly:
        run.until(lambda: run.events("save_failed") or run.events("save_skipped"), "a save that is given up")
    return "until the next try" if briefly else "until a save was given up"


def answered(lab: Lab, run: Run, ops: str, error: int) -> Moments:
    """By the fault layer."""
    soon(lab, run)
    run.mark()
    lab.layer.arm(ops, run.checkpoints, error)
    moment = refused(lab, run, error)
    lab.layer.rest()
    yield moment
    run.until(lambda: run.events("saved") or run.done, "a save after it")


@fault(times=8)
def disk_answers_eio(lab: Lab, run: Run, number: int) -> Moments:
    yield from answered(lab, run, lab.random.choice(("w", "s", "r", "o")), errno.EIO)


@fault(times=8)
def quota(lab: Lab, run: Run, number: int) -> Moments:
    yield from answered(lab, run, "wom", errno.EDQUOT)


@fault(times=8)
def read_only_mount(lab: Lab, run: Run, number: int) -> Moments:
    """A real one where that is permitted."""
    path = str(run.checkpoints)
    soon(lab, run)
    run.until(run.checkpoints.is_dir, "a checkpoint")
    run.mark()
    if not mounted(["--bind", path, path]):
        yield from answered(lab, run, CHANGES, errno.EROFS)
        return
    try:
        run.until(lambda: mounted(["-o", "remount,bind,ro", path]), "the remount")  # refused while a file is written
        moment = refused(lab, run, errno.EROFS)
        if not mounted(["-o", "remount,bind,rw", path]):
            raise Missed("the mount stays read-only")
    finally:
        unmount(run.checkpoints)
    yield f"{moment} (mount)"
    run.until(lambda: run.events("saved") or run.done, "a save after it")


@fault(times=8)
def disk_full(lab: Lab, run: Run, number: int) -> Moments:
    """A tmpfs that lacks room for one more checkpoint and then grows, where that is permitted."""
    soon(lab, run)
    run.until(lambda: checkpoint.complete(run.checkpoints), "a checkpoint")
    run.down()
    held = run.folder.with_name(f"{run.folder.name}-held")
    for path in checkpoint.complete(run.checkpoints):
        shutil.copytree(path, held / path.name)
    unmount(run.checkpoints)  # of the time before
    shutil.rmtree(run.checkpoints)
    run.checkpoints.mkdir()
    (whole, _) = lab.undisturbed(run.world)
    size = sum(path.stat().st_size for path in (whole.checkpoints / f"step-{whole.step():08d}").iterdir())
    room = int((len(list(held.iterdir())) + 0.6) * size)
    tmpfs = mounted(["-t", "tmpfs", "-o", f"size={room >> 10}k", "tmpfs", str(run.checkpoints)])
    if tmpfs:
        run.undo.callback(unmount, run.checkpoints)
    shutil.copytree(held, run.checkpoints, dirs_exist_ok=True)
    shutil.rmtree(held)
    run.mark()
    if not tmpfs:
        lab.layer.arm("wom", run.checkpoints, errno.ENOSPC)
    run.start()
    moment = refused(lab, run, errno.ENOSPC)
    if tmpfs and not mounted(["-o", "remount,size=64m", str(run.checkpoints)]):
        raise Missed("the disk does not grow")
    lab.layer.rest()
    yield f"{moment}{' (tmpfs)' if tmpfs else ''}"
    run.until(lambda: run.events("saved") or run.done, "a save after it")


@fault(times=4)
def whole_run_folder_full(lab: Lab, run: Run, number: int) -> Moments:
    """Logs, lists and checkpoints alike; the harness reads the lines when they have come out of memory."""
    soon(lab, run)
    run.mark()
    lab.layer.arm("wom", run.folder, errno.ENOSPC)
    run.until(lambda: run.said(f"Errno {errno.ENOSPC}"), "a refusal")
    seconds = lab.random.uniform(0.2, 2.0)
    time.sleep(seconds)
    lab.layer.rest()
    yield f"{seconds:.1f} s"
    run.until(lambda: run.events("saved") or run.done, "a save after it")


@fault(times=4)
def disk_is_slow(lab: Lab, run: Run, number: int) -> Moments:
    soon(lab, run)
    run.mark()
    lab.layer.arm("ws", run.checkpoints, SLOW, delay_ms=200)
    run.until(lambda: any(event["written_s"] > 0.6 for event in run.events("saved")), "a slow save")
    lab.layer.rest()
    yield "200 ms for each write and fsync"


@fault(times=8)
def shard_reads_answer_eio(lab: Lab, run: Run, number: int) -> Moments:
    """Two reads in a row: as many as the reader tries again."""
    step = soon(lab, run)
    lab.layer.arm("p", lab.shards, errno.EIO, count=2)
    run.until(lambda: lab.layer.struck == 2, "two reads")
    lab.layer.rest()
    yield f"step {step}"
