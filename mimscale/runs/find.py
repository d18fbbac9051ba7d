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
    yield from _below(root, unreadable, seen)


def _below(folder: Path, unreadable: list[str], seen: set[tuple[int, int]]) -> Iterator[Path]:
    try:
        about = folder.stat()
        if (about.st_dev, about.st_ino) in seen:
            return
        seen.add((about.st_dev, about.st_ino))
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        unreadable.append(f"{folder} cannot be read ({error.strerror})")
        return
    if _names_a_run({entry.name for entry in listed}):
        yield folder
    for entry in listed:
        if entry.name in PARTS or entry.name.startswith("."):
            continue
        try:
            below = entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and is_run(folder / entry.name))
        except OSError:
            continue
        if below:
            yield from _below(folder / entry.name, unreadable, seen)


def is_run(folder: Path) -> bool:
    """Whether a training has begun there."""
    try:
        return _names_a_run(set(os.listdir(folder)))
    except OSError:
        return False


def _names_a_run(names: set[str]) -> bool:
    return bool(names & {"launches.jsonl", "metrics.jsonl"}) or {"config.yaml", "lock"} <= names
