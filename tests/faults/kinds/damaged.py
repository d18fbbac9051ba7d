"""Checkpoint files that are not as they were written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mimscale.checkpoint import format as checkpoint
from tests.faults.kinds._kind import Moments, fault, soon
from tests.faults.lab import Lab, Missed, Run


def damage(lab: Lab, run: Run, harm: Callable[[Path], object]) -> Moments:
    """Kill the run, harm its newest checkpoint; the restart must say that it takes the one before."""
    soon(lab, run)
    run.until(lambda: len(checkpoint.complete(run.checkpoints)) > 1, "a second checkpoint")
    run.down()
    newest = checkpoint.newest(run.folder)
    if run.done or newest is None or len(checkpoint.complete(run.checkpoints)) < 2:
        raise Missed("not killed between two checkpoints")
    harm(newest)
    run.mark()
    yield newest.name
    if not run.said(f"passing over {newest.name}"):
        raise Missed("the damage was not noticed")


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 4
    path.write_bytes(content)


def shard(folder: Path, lab: Lab) -> Path:
    return lab.random.choice(sorted(folder.glob("*.safetensors")))


@fault(times=10)
def bit_flip_in_a_shard(lab: Lab, run: Run, number: int) -> Moments:
    yield from damage(lab, run, lambda newest: flip(shard(newest, lab), lab.random.randrange(10**6)))


@fault(times=4)
def bit_flip_in_the_manifest(lab: Lab, run: Run, number: int) -> Moments:
    yield from damage(lab, run, lambda newest: flip(newest / "manifest.json", lab.random.randrange(10**6)))


@fault(times=6)
def truncated_shard(lab: Lab, run: Run, number: int) -> Moments:
    def harm(newest: Path) -> None:
        path = shard(newest, lab)
        os.truncate(path, lab.random.randrange(path.stat().st_size))

    yield from damage(lab, run, harm)


@fault(times=6)
def missing_shard(lab: Lab, run: Run, number: int) -> Moments:
    yield from damage(lab, run, lambda newest: shard(newest, lab).unlink())


@fault(times=2)
def missing_manifest(lab: Lab, run: Run, number: int) -> Moments:
    yield from damage(lab, run, lambda newest: (newest / "manifest.json").unlink())


@fault(times=4)
def missing_complete_marker(lab: Lab, run: Run, number: int) -> Moments:
    yield from damage(lab, run, lambda newest: (newest / "COMPLETE").unlink())
