"""Writes a manifest for existing WebDataset shards, here or on a server. Only their tar headers are read; nothing is
copied or changed.

All shards are read, and every one that cannot be indexed is named. What was read is kept in a journal beside the
manifest, so that the same command continues after an interruption or after bad shards were replaced.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.index_journal import Journal, Scan
from data_prep.labels import check_names
from data_prep.reports import report
from data_prep.scan_shard import NO_IMAGE, ShardContents, scan_shard
from data_prep.shard_list import SHARD_NAME, ShardList
from data_prep.tar import File, read_at
from data_prep.write_manifest import PLAN
from mimscale.data.manifest import Ints, Shard, save_manifest
from mimscale.data.names import one_line
from mimscale.data.storage import is_remote
from mimscale.errors import UserError

CHUNK = 4 << 20
BAD = "bad_shards.txt"


@dataclass(frozen=True)
class IndexOptions:
    """image, label: see `scan_shard`; label None = cls if any shard has such labels, "none" = unlabelled. classes:
    their names in the order of the class index. skip_unlabelled: leave out samples without a label, which are refused
    by default. skip_bad: leave out shards that cannot be indexed. checksums: also read all bytes, for the sha256 of
    each shard. files: pattern of the names of the shards.
    """

    image: str | None = None
    label: str | None = None
    classes: list[str] | None = None
    skip_unlabelled: bool = False
    skip_bad: bool = False
    checksums: bool = False
    files: str | None = None

    def key(self) -> str:
        """Of a journal: what the contents of a scan depend on."""
        return hashlib.sha256(repr((2, self.image, self.label, self.classes)).encode()).hexdigest()[:16]


def index_shards(
    shards: ShardList,
    options: IndexOptions,
    *,
    to: Path | None = None,
    jobs: int = 1,
    done: Callable[[int], None] = lambda shards: None,
) -> Path:
    """Write the manifest of the shards: into their folder, or into `to`, with links to local shards. Returns where.

    done: called with 1 after each shard. Raises UserError, before a manifest is written: it counts and names all shards
    that cannot be indexed.
    """
    if to is None and is_remote(shards.location):
        raise UserError(f"'{shards.location}' is not on this machine; give --to DST, a folder for the index")
    target = Path(shards.location) if to is None else to
    if (target / PLAN).exists():
        raise UserError(
            f"'{target}' was written by data_prep, which writes its manifest itself; use `python -m data_prep finish`"
        )
    journal = Journal(target, options.key())
    if to is not None and to.is_dir() and set(os.listdir(to)) - {journal.path.name, BAD}:
        raise UserError(f"destination '{to}' is not empty; choose a new folder")
    known = journal.read()
    scan = partial(_scan, shards, options)
    todo = [name for name in shards.names if not _is_current(shards, known.get(name), options.checksums)]
    if len(todo) < len(shards.names):
        kept = len(shards.names) - len(todo)
        print(f"{kept:,} of {len(shards.names):,} shards were read before; skipped", file=sys.stderr)
        done(kept)
    bad: dict[str, str] = {}
    for name, result in zip(todo, _map(scan, todo, jobs), strict=True):
        if isinstance(result, str):
            bad[name] = result
        else:
            known[name] = result
            journal.append(result)
        done(1)
    _report_bad(shards, bad, options.skip_bad, target)
    _save(target, shards, [known[name] for name in shards.names if name not in bad], bad, options)
    journal.remove()
    return target


def sha256(file: File) -> str:
    """The checksum of an open file (hex)."""
    digest, offset = hashlib.sha256(), 0
    while chunk := read_at(file, CHUNK, offset):
        digest.update(chunk)
        offset += len(chunk)
    return digest.hexdigest()


def class_indices(labels: Sequence[int | str], classes: Sequence[str] | None) -> tuple[Ints, list[str] | None]:
    """(int64 [n] class indices, names of the classes) of labels that are all indices or all names.

    classes: the names; None = the sorted names that occur, or none for indices. Raises UserError.
    """
    check_names(classes or ())
    names = {label for label in labels if isinstance(label, str)}
    if names and classes is None:
        if any(isinstance(label, int) for label in labels):
            raise UserError(f"some labels are numbers and others names, for example '{min(names)}'; see --label")
        classes = sorted(names)
    number = {name: index for index, name in enumerate(classes or ())}
    unknown = sorted(names - number.keys())
    if unknown:
        raise UserError(
            f"{len(unknown):,} labels are not among the {len(number):,} class names, the first is "
            f"'{one_line(unknown[0])}'; complete that list"
        )
    indices = np.array([number[label] if isinstance(label, str) else label for label in labels], dtype=np.int64)
    if classes is not None and len(indices) and indices.max() >= len(classes):
        raise UserError(f"label {indices.max()} has no name among the {len(classes):,} class names; complete that list")
    return indices, None if classes is None else list(classes)


def _map(scan: Callable[[str], Scan | str], names: list[str], jobs: int) -> Iterator[Scan | str]:
    if jobs == 1 or len(names) < 2:
        yield from map(scan, names)
    else:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield from pool.map(scan, names)


def _scan(shards: ShardList, options: IndexOptions, name: str) -> Scan | str:
    """What the shard holds, or why it cannot be indexed."""
    shown = f"{shards.location}/{name}"
    odd = not SHARD_NAME.fullmatch(name)
    rename = f"shard '{one_line(shown)}': only letters, digits, '.', '_', '-' and .tar make its name; rename it"
    if odd and name.lower().endswith(".tar"):
        return rename
    try:
        with shards.open(name) as file:
            label = None if options.label == "none" else options.label or "cls"
            contents = scan_shard(file, shown, options.image, label, options.classes or ())
            if odd:  # named as if it were compressed
                return rename
            size, changed = shards.identity(name)
            return Scan(name, size, changed, sha256(file) if options.checksums else None, contents)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"shard '{shown}' cannot be read: {error.strerror or error}"


def _is_current(shards: ShardList, scan: Scan | None, checksum: bool) -> bool:
    if scan is None or (checksum and scan.sha256 is None):
        return False
    try:
        return (scan.bytes, scan.changed) == shards.identity(scan.name)
    except OSError:
        return False


def _report_bad(shards: ShardList, bad: dict[str, str], skip: bool, target: Path) -> None:
    """Raises UserError, unless they are to be left out."""
    if not bad:
        return
    total = f"{len(bad):,} of {len(shards.names):,} shards"
    if len(bad) == 1 and not skip:
        (reason,) = bad.values()
        raise UserError(f"{reason} ({total}; --skip-bad leaves it out)")
    rest = report("bad", list(bad.values()), target / BAD)
    if not skip:
        raise UserError(f"{total} cannot be indexed{rest}; make them again, or leave them out with --skip-bad")
    print(f"{total} are left out{rest}", file=sys.stderr)


@dataclass
class _Parts:
    """What the scans of all shards give together."""

    shards: list[Shard] = field(default_factory=list)
    spans: list[Ints] = field(default_factory=list)
    labels: list[int | str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def _save(target: Path, shards: ShardList, scans: list[Scan], bad: dict[str, str], options: IndexOptions) -> None:
    labelled = options.label != "none" and any(scan.contents.labels is not None for scan in scans)
    if options.label not in (None, "none") and not labelled and any(len(scan.contents.spans) for scan in scans):
        labelled = True  # asked for, so that they are all missing is an error
    if options.label is None and not labelled:
        _refuse_labels_apart(shards, scans)
    if labelled and not options.skip_unlabelled:
        _refuse_unlabelled(shards, scans, options.label or "cls")
    parts = _Parts()
    for scan in scans:
        contents = scan.contents
        if labelled:
            contents = ShardContents(*contents)._replace(labels=contents.labels or [None] * len(contents.spans))
            contents = contents.without_unlabelled()
            parts.labels += [label for label in contents.labels or () if label is not None]
        parts.left_out |= {f"{scan.name}/{key}": reason for key, reason in contents.left_out.items()}
        if not len(contents.spans) and not contents.left_out:
            parts.left_out[scan.name] = "a shard without members"
        if len(contents.spans):
            parts.spans.append(contents.spans)
            parts.shards.append(Shard(name=scan.name, count=len(contents.spans), bytes=scan.bytes, sha256=scan.sha256))
    if not parts.shards:
        why = ", ".join(f"{count:,} {reason}" for reason, count in Counter(parts.left_out.values()).most_common(3))
        raise UserError(f"the shards in '{shards.location}' hold no images ({why or 'empty'}); see --image EXTENSION")
    labels, classes = class_indices(parts.labels, options.classes) if labelled else (None, options.classes)
    target.mkdir(parents=True, exist_ok=True)
    remote = is_remote(shards.location)
    if not remote and target.resolve() != Path(shards.location).resolve():
        for shard in parts.shards:
            (target / shard.name).symlink_to((Path(shards.location) / shard.name).resolve())
    save_manifest(
        target,
        shards=parts.shards,
        index=np.concatenate(parts.spans),
        labels=labels,
        classes=classes,
        seed=0,
        options=_manifest_options(options, labelled),
        source={"kind": "webdataset", "path": shards.location},
        left_out=parts.left_out,
        skipped=shards.skipped,
        bad_shards=bad,
        location=shards.location if remote else None,
    )


def _manifest_options(options: IndexOptions, labelled: bool) -> dict[str, Any]:
    label = (options.label or "cls") if labelled else None
    skip = options.skip_unlabelled
    return {"image": options.image, "label": label, "skip_unlabelled": skip, "files": options.files}


def _refuse_labels_apart(shards: ShardList, scans: list[Scan]) -> None:
    """Raises UserError if there are labels, but none of them beside an image: the set would have none."""
    reasons = [reason for scan in scans for reason in scan.contents.left_out.values()]
    apart = sum(reason.startswith(NO_IMAGE) and ".cls" in reason for reason in reasons)
    if apart and any(len(scan.contents.spans) for scan in scans):
        raise UserError(
            f"{apart:,} labels .cls in '{shards.location}' do not stand beside an image of their name, and no other "
            "label is there; make the shards again with each image and its label under one name and together, or give "
            "--label none"
        )


def _refuse_unlabelled(shards: ShardList, scans: list[Scan], label: str) -> None:
    """Raises UserError if samples have no label."""
    missing, first, total = 0, "", 0
    for scan in scans:
        labels = scan.contents.labels or [None] * len(scan.contents.spans)
        total += len(labels)
        missing += sum(value is None for value in labels)
        if missing and not first:
            first = f"{scan.name}/{scan.contents.keys[labels.index(None)]}"
    if missing:
        raise UserError(
            f"{missing:,} of {total:,} samples of '{shards.location}' have no label {label}, the first is "
            f"'{one_line(first)}'; see --label, leave them out with --skip-unlabelled, or give --label none"
        )
