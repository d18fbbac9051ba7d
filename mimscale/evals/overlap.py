"""Whether a validation set holds images of the training set: then its figures say nothing."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np

from mimscale.data.manifest import Manifest
from mimscale.errors import UserError, warn

SAMPLED = 64  # images of the validation set
COMPARED = 2000  # images of the training set that are read, at most


def check_apart(train_path: Path, train: Manifest, val_path: Path, val: Manifest) -> None:
    """Raises UserError where all of val is in train, under whatever path; warns where some of it is."""
    if train.fingerprint == val.fingerprint:
        raise UserError(f"--val {val_path} is the training set itself; give data that --train does not hold")
    shards = {shard.sha256 for shard in train.file.shards if shard.sha256}
    same = [shard for shard in val.file.shards if shard.sha256 in shards]
    if same:
        raise UserError(
            f"--val {val_path} holds shards of --train {train_path} ({same[0].name}, {len(same):,} of "
            f"{len(val.file.shards):,}); give data that --train does not hold"
        )
    asked, found = sampled_overlap(train, val)
    if asked and found == asked:
        raise UserError(
            f"--val {val_path} holds images of --train {train_path}: all {asked} that were compared are there to the "
            f"byte; give data that --train does not hold"
        )
    if found:
        warn(
            f"mimscale evaluate: warning: {found} of {asked} images of --val {val_path} that were compared are in "
            f"--train {train_path} too, so the figures are too high"
        )


def sampled_overlap(train: Manifest, val: Manifest) -> tuple[int, int]:
    """(number of images of val, spread evenly, that were compared; of these, those that train holds to the byte).

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
