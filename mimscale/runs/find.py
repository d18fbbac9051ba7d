"""Which folders below a folder are runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PARTS = ("checkpoints", "tensorboard", "wandb", "mlruns", "hang")
"""Folders in which no run is searched for."""


def find_runs(root: Path, unreadable: list[str]) -> Iterator[Path]:
    """`root` itself, if it is a run, and those below it, in the order of their names.

    A link to a folder is followed where that is a run, so that a link to "/" costs nothing; no folder is read twice.
    unreadable: gets a line for each folder that cannot be listed.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            about = folder.stat()
            if (about.st_dev, about.st_ino) in seen:
                continue
            seen.add((about.st_dev, about.st_ino))
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            unreadable.append(f"{folder} cannot be read ({error.strerror})")
            continue
        if _names_a_run({entry.name for entry in listed}):
            yield folder
        waiting += [folder / entry.name for entry in reversed(listed) if _may_hold_runs(folder, entry)]


def _may_hold_runs(folder: Path, entry: os.DirEntry[str]) -> bool:
    if entry.name in PARTS or entry.name.startswith("."):
        return False
    try:
        return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and is_run(folder / entry.name))
    except OSError:
        return False


def is_run(folder: Path) -> bool:
    """Whether a training has begun there."""
    try:
        return _names_a_run(set(os.listdir(folder)))
    except OSError:
        return False


def _names_a_run(names: set[str]) -> bool:
    return bool(names & {"launches.jsonl", "metrics.jsonl"}) or {"config.yaml", "lock"} <= names
