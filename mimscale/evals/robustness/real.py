"""ReaL: several labels, or none, for each image of ImageNet's validation set (Beyer et al. 2020, arXiv 2006.07159)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mimscale.data.manifest import Manifest
from mimscale.errors import UserError
from mimscale.files.regular import read_regular

_NUMBER = re.compile(r"val_(\d+)$")  # ILSVRC2012_val_00000001 is line 1


def read_real(path: Path) -> list[list[int]]:
    """real.json: a list with one list of class indices per image, in the order of the images' numbers.

    Raises UserError.
    """
    try:
        found = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"--real {path} cannot be read ({error}); give real.json of google-research/reassessed-imagenet"
        ) from None
    if not isinstance(found, list) or not all(
        isinstance(row, list) and all(type(v) is int and v >= 0 for v in row) for row in found
    ):
        raise UserError(f"--real {path} is not a list of lists of class indices; give the original real.json")
    return found


def real_labels(path: Path, val: Manifest, classes: int) -> list[list[int]]:
    """The labels of each sample of the validation shards, in their order. Raises UserError.

    classes: of the validation set; its labels must be in ImageNet's order, the sorted wnids.
    """
    rows = read_real(path)
    if len(rows) != val.samples:
        raise UserError(
            f"--real {path} has labels of {len(rows):,} images, --val {val.location} holds {val.samples:,}; both must "
            "be of the whole validation set"
        )
    highest = max((max(row) for row in rows if row), default=0)
    if highest >= classes or val.classes is None or val.classes != sorted(val.classes):
        raise UserError(
            f"--real {path} has class {highest} of ImageNet's sorted wnids, --val {val.location} has {classes:,} "
            "classes or another order of them; prepare it with `python -m data_prep imagenet --val`"
        )
    numbers = [_number(val, sample) for sample in range(val.samples)]
    if sorted(numbers) != list(range(1, len(rows) + 1)):
        raise UserError(
            f"--real: the keys of --val {val.location} are not val_1 to val_{len(rows)}, the first is "
            f"'{val.key(0)}'; keep the names of the files (ILSVRC2012_val_00000001.JPEG)"
        )
    return [rows[number - 1] for number in numbers]


def real_accuracy(predictions_N: Tensor, labels: Sequence[Sequence[int]]) -> float:
    """Percent of the images with at least one label whose int64 prediction [N] is one of them."""
    counted = [(int(value), row) for value, row in zip(predictions_N, labels, strict=True) if row]
    if not counted:
        return float("nan")
    return round(100 * float(np.mean([value in row for value, row in counted])), 4)


def _number(val: Manifest, sample: int) -> int:
    match = _NUMBER.search(val.key(sample))
    return int(match[1]) if match else 0


def covered(labels: Sequence[Sequence[int]]) -> Tensor:
    """bool [N]: which images have a label."""
    return torch.tensor([bool(row) for row in labels])
