"""Writes a manifest for existing WebDataset shards. Only their tar headers are read; nothing is copied or changed."""

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

from data_prep.scan_shard import ShardContents, scan_shard
from data_prep.splits import chosen_files
from data_prep.tar import members, open_for_reading
from data_prep.write_manifest import PLAN
from mimscale.data.manifest import Shard, save_manifest
from mimscale.data.sidecars import is_sidecar
from mimscale.errors import UserError

CHUNK = 4 << 20
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.tar")


def index_shards(
    folder: Path,
    *,
    to: Path | None = None,
    files: str | None = None,
    image: str | None = None,
    label: str | None = "cls",
    classes: list[str] | None = None,
    skip_unlabelled: bool = False,
    checksums: bool = False,
    jobs: int = 1,
    done: Callable[[int], None] = lambda shards: None,
) -> Path:
    """Write the manifest for the tar files in `folder`: into `folder`, or into `to` with links to them. Returns where.

    files: pattern of the names, see `chosen_files`.
    image, label, skip_unlabelled: see `scan_shard`; label "cls" means unlabelled if no sample of the first shard has
    one. checksums: also read all bytes and store the sha256 of each shard. done: called with 1 after each shard. Raises
    UserError before anything is written.
    """
    paths = tar_files(folder, files)
    target = folder if to is None else to
    if (target / PLAN).exists():
        raise UserError(
            f"'{target}' was written by data_prep, which writes its manifest itself; use `python -m data_prep finish`"
        )
    if to is not None and to.is_dir() and any(to.iterdir()):
        raise UserError(f"destination '{to}' is not empty; choose a new folder")
    if label == "cls" and not _has_labels(paths[0]):
        label = None
    scan = partial(_scan, image=image, label=label, skip_unlabelled=skip_unlabelled, checksum=checksums)
    scans: list[_Scan] = []
    if jobs == 1:
        for path in paths:
            scans.append(scan(path))
            done(1)
    else:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            for result in pool.map(scan, paths):
                scans.append(result)
                done(1)
    _save(
        target,
        paths,
        scans,
        classes,
        {
            "image": image,
            "label": label,
            **({"skip_unlabelled": True} if skip_unlabelled else {}),
            **({"files": files} if files else {}),
        },
    )
    return target


def tar_files(folder: Path, pattern: str | None = None) -> list[Path]:
    """The .tar files of a folder whose names match the pattern, sorted by name. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"shards '{folder}': no such folder")
    paths = sorted(path for path in folder.iterdir() if path.suffix == ".tar" and not path.name.startswith("."))
    if not paths:
        raise UserError(f"'{folder}' holds no .tar files; compressed shards must be unpacked to .tar first")
    paths = chosen_files(folder, paths, pattern)
    for path in paths:
        if not SHARD_NAME.fullmatch(path.name):
            raise UserError(f"shard '{path}': only letters, digits, '.', '_' and '-' may be in its name; rename it")
    return paths


def _has_labels(path: Path) -> bool:
    with open_for_reading(path) as fd:
        return any(member.name.lower().endswith(".cls") and not is_sidecar(member.name) for member in members(fd, path))


_Scan = tuple[ShardContents, int, str | None]  # contents, length in bytes, sha256


def _scan(path: Path, *, image: str | None, label: str | None, skip_unlabelled: bool, checksum: bool) -> _Scan:
    with open_for_reading(path) as fd:
        contents = scan_shard(fd, path, image, label, skip_unlabelled)
        return contents, os.fstat(fd).st_size, sha256(fd) if checksum else None


def sha256(fd: int) -> str:
    """The checksum of an open file (hex)."""
    digest, offset = hashlib.sha256(), 0
    while chunk := os.pread(fd, CHUNK, offset):
        digest.update(chunk)
        offset += len(chunk)
    return digest.hexdigest()


def _save(
    target: Path,
    paths: list[Path],
    scans: list[_Scan],
    classes: list[str] | None,
    options: dict[str, Any],
) -> None:
    shards = [(path, *scan) for path, scan in zip(paths, scans, strict=True) if len(scan[0].spans)]
    if not shards:
        raise UserError(f"the shards in '{paths[0].parent}' hold no images; see --image EXTENSION")
    labels = None
    if options["label"] is not None:
        labels = np.concatenate([contents.labels for _, contents, _, _ in shards if contents.labels is not None])
        if classes is not None and labels.max() >= len(classes):
            raise UserError(
                f"label {labels.max()} has no name among the {len(classes):,} class names; complete that list"
            )
    if target != paths[0].parent:
        target.mkdir(parents=True, exist_ok=True)
        for path, *_ in shards:
            (target / path.name).symlink_to(path.resolve())
    save_manifest(
        target,
        shards=[Shard(name=p.name, count=len(s.spans), bytes=size, sha256=checksum) for p, s, size, checksum in shards],
        index=np.concatenate([contents.spans for _, contents, _, _ in shards]),
        labels=labels,
        classes=classes,
        seed=0,
        options=options,
        source={"kind": "webdataset", "path": str(paths[0].parent)},
        left_out={key: reason for contents, _, _ in scans for key, reason in contents.left_out.items()},
    )
