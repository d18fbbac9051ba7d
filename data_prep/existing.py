"""WebDataset shards that exist already get a manifest: their headers are read, nothing is copied or changed."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.finish import PLAN
from data_prep.samples import Found, find_samples
from data_prep.tar import members, opened
from mimscale.data.manifest import Shard, save_manifest
from mimscale.errors import UserError

CHUNK = 4 << 20
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.tar")


def index_shards(
    folder: Path,
    *,
    to: Path | None = None,
    image: str | None = None,
    label: str | None = "cls",
    classes: list[str] | None = None,
    checksums: bool = False,
    jobs: int = 1,
    done: Callable[[int], None] = lambda shards: None,
) -> Path:
    """Write the manifest for the tar files in `folder` beside them, or, with links to them, into `to`. Returns where.

    image, label: see `find_samples`; "cls" where no sample of the first shard has one means unlabelled. checksums: also
    read every byte. done: called with 1 after each shard. Raises UserError; then nothing was written.
    """
    paths = tar_files(folder)
    target = folder if to is None else to
    if (target / PLAN).exists():
        raise UserError(f"'{target}' was written by data_prep, which gives it its manifest; see its verb finish")
    if to is not None and to.is_dir() and any(to.iterdir()):
        raise UserError(f"destination '{to}' is not empty; choose a new folder")
    if label == "cls" and not _has_labels(paths[0]):
        label = None
    scan = partial(_scan, image=image, label=label, checksum=checksums)
    found: list[tuple[Found, int, str | None]] = []
    if jobs == 1:
        for path in paths:
            found.append(scan(path))
            done(1)
    else:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            for result in pool.map(scan, paths):
                found.append(result)
                done(1)
    _save(target, paths, found, classes, {"image": image, "label": label})
    return target


def tar_files(folder: Path) -> list[Path]:
    """In the order of their names. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"shards '{folder}': no such folder")
    paths = sorted(path for path in folder.iterdir() if path.suffix == ".tar" and not path.name.startswith("."))
    if not paths:
        raise UserError(f"'{folder}' holds no .tar files; compressed shards must be unpacked to .tar first")
    for path in paths:
        if not SHARD_NAME.fullmatch(path.name):
            raise UserError(f"shard '{path}': only letters, digits, '.', '_' and '-' may be in its name; rename it")
    return paths


def _has_labels(path: Path) -> bool:
    with opened(path) as fd:
        return any(member.name.lower().endswith(".cls") for member in members(fd, path))


def _scan(path: Path, *, image: str | None, label: str | None, checksum: bool) -> tuple[Found, int, str | None]:
    with opened(path) as fd:
        found = find_samples(fd, path, image, label)
        return found, os.fstat(fd).st_size, sha256(fd) if checksum else None


def sha256(fd: int) -> str:
    """Of a whole open file."""
    digest, at = hashlib.sha256(), 0
    while chunk := os.pread(fd, CHUNK, at):
        digest.update(chunk)
        at += len(chunk)
    return digest.hexdigest()


def _save(
    target: Path,
    paths: list[Path],
    found: list[tuple[Found, int, str | None]],
    classes: list[str] | None,
    options: dict[str, Any],
) -> None:
    whole = [(path, *facts) for path, facts in zip(paths, found, strict=True) if len(facts[0].places)]
    if not whole:
        raise UserError(f"the shards in '{paths[0].parent}' hold no pictures; see --image EXTENSION")
    labels = None
    if options["label"] is not None:
        labels = np.concatenate([scanned.labels for _, scanned, _, _ in whole if scanned.labels is not None])
        if classes is not None and labels.max() >= len(classes):
            raise UserError(f"label {labels.max()} is beyond the {len(classes):,} class names; complete that list")
    if target != paths[0].parent:
        target.mkdir(parents=True, exist_ok=True)
        for path, *_ in whole:
            (target / path.name).symlink_to(path.resolve())
    save_manifest(
        target,
        shards=[Shard(name=p.name, count=len(s.places), bytes=size, sha256=checksum) for p, s, size, checksum in whole],
        index=np.concatenate([scanned.places for _, scanned, _, _ in whole]),
        labels=labels,
        classes=classes,
        seed=0,
        options=options,
        source={"kind": "webdataset", "path": str(paths[0].parent)},
        left_out={key: reason for scanned, _, _ in found for key, reason in scanned.left_out.items()},
    )
