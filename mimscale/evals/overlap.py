"""Whether a validation set holds images of the training set: then its figures say nothing."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np

from mimscale.data.manifest import Manifest
from mimscale.errors import UserError, warn

OWN = "the run's training set"
SAMPLED = 64  # images of the validation set
COMPARED = 2000  # images of the training set that are read, at most


def check_apart(train_path: Path, train: Manifest, val_path: Path, val: Manifest) -> None:
    """Raises UserError where all of val is in train, under whatever path; warns where some of it is."""
    check_overlap(f"--train {train_path}", train, f"--val {val_path}", val)


def check_apart_from_training(shards: object, given: str, val: Manifest, learned: str = OWN) -> None:
    """The same for a run with a head of its own. shards: what it was trained on, as far as that can be opened here."""
    if not isinstance(shards, str | Path):
        return
    try:
        train = Manifest.load(shards, check_shards=False)
    except UserError:  # it has moved, or the file does not say; the figures can be had without it
        return
    check_overlap(f"{learned} {shards}", train, given, val)


def check_overlap(learned: str, train: Manifest, given: str, val: Manifest) -> None:
    """`check_apart` with words of the caller's for both. Raises UserError."""
    check_shards_apart(learned, train, given, val)
    asked, found = sampled_overlap(train, val)
    if asked and found == asked:
        raise UserError(
            f"{given} holds images of {learned}: all {asked} that were compared are there to the byte; give other data"
        )
    if found:
        warn(
            f"mimscale evaluate: warning: {found} of {asked} images of {given} that were compared are in {learned} "
            f"too, so the figures are too high"
        )


def check_shards_apart(learned: str, train: Manifest, given: str, val: Manifest) -> None:
    """By the manifests alone, which costs nothing. Raises UserError."""
    if train.fingerprint == val.fingerprint:
        raise UserError(f"{given} is the training set itself; give data that {learned} does not hold")
    shards = {shard.sha256 for shard in train.file.shards if shard.sha256}
    same = [shard for shard in val.file.shards if shard.sha256 in shards]
    if same:
        raise UserError(
            f"{given} holds shards of {learned} ({same[0].name}, {len(same):,} of {len(val.file.shards):,}); give "
            f"other data"
        )


def sampled_overlap(train: Manifest, val: Manifest) -> tuple[int, int]:
    """(number of images of val, at equal distances, that were compared; of these, those that train holds to the byte).

    Only images of the same length in bytes are read. What cannot be read counts for nothing.
    """
    asked = found = compared = 0
    for number in np.unique(np.linspace(0, val.samples - 1, SAMPLED).astype(np.int64)).tolist():
        candidates = np.flatnonzero(train.sizes == val.sizes[number]).tolist()
        if compared + len(candidates) > COMPARED:
            break
        compared += len(candidates)
        with suppress(OSError):
            wanted = val.read(number) if candidates else b""
            found += any(train.read(candidate) == wanted for candidate in candidates)
            asked += 1
    return asked, found
