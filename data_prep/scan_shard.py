"""Finds the samples of a WebDataset shard from its tar headers.

Consecutive members with the same key are one sample. As in webdataset, the key is the path up to the first dot of the
file name, and the rest is the extension. Only the header of the image and the label are read, and no other member.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.images import SIGNATURE_BYTES, sniff
from data_prep.labels import check_class, label_value
from data_prep.tar import Member, members
from mimscale.data.decode import EXTENSIONS
from mimscale.data.manifest import Ints
from mimscale.data.sidecars import is_sidecar
from mimscale.errors import UserError

MAX_LABEL_BYTES = 1 << 16  # of the member that holds the label


class ShardContents(NamedTuple):
    """spans: int64 [n, 2], offset and size of each image. labels: int64 [n] or None. left_out: key -> reason."""

    spans: Ints
    labels: Ints | None
    left_out: dict[str, str]


def scan_shard(
    fd: int, path: Path, image: str | None, label: str | None, skip_unlabelled: bool = False
) -> ShardContents:
    """All samples of the shard that is open as `fd`; `path` is for messages.

    image: extension of the image; None = any extension of an image format. label: extension of a member that holds the
    class index as text, or json:KEY for a number in a json member; None = no labels. skip_unlabelled: leave out
    samples without a label. Raises UserError.
    """
    spans: list[tuple[int, int]] = []
    labels: list[int] = []
    left_out: dict[str, str] = {}
    unlabelled: list[str] = []
    apart: set[str] = set()  # keys of labels without an image beside them
    for key, sample in _samples(fd, path, left_out):
        member = _image_member(key, sample, path, image)
        if member is None:
            _leave_out(left_out, key, "no image")
            if label is not None and label.partition(":")[0] in sample:
                apart.add(key)
        elif sniff(member.start[:SIGNATURE_BYTES]) is None:
            _leave_out(left_out, key, "not an image")
        else:
            number = None if label is None else _label(fd, key, sample, path, label)
            if label is not None and number is None:
                unlabelled.append(key)
                _leave_out(left_out, key, "no label")
                continue
            spans.append((member.offset, member.size))
            labels += [] if number is None else [number]
    separate = [key for key in unlabelled if key in apart]
    if separate:
        raise UserError(
            f"image and label of {len(separate):,} samples of '{path}' do not stand together, the first is "
            f"'{separate[0]}'; make the shard again with its members sorted by name (tar --sort=name)"
        )
    if unlabelled and not skip_unlabelled:
        total = len(spans) + len(unlabelled)
        raise UserError(
            f"{len(unlabelled):,} of {total:,} samples of '{path}' have no label {label}, the first is "
            f"'{unlabelled[0]}'; see --label, leave them out with --skip-unlabelled, or give --label none"
        )
    return ShardContents(
        np.array(spans, dtype=np.int64).reshape(-1, 2),
        None if label is None else np.array(labels, dtype=np.int64),
        left_out,
    )


def _samples(fd: int, path: Path, left_out: dict[str, str]) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, extension -> member). Members that belong to no sample are passed over, as by webdataset, and recorded.

    A second member with the same key and extension begins another sample, so that none takes the place of the first.
    """
    current, sample = "", dict[str, Member]()
    for member in members(fd, path):
        key, extension = _split(member.name)
        if is_sidecar(member.name):
            _leave_out(left_out, member.name, "hidden or of the system")
        elif not extension:
            _leave_out(left_out, key, "no image")
        else:
            if sample and (key != current or extension in sample):
                yield current, sample
                sample = {}
            current = key
            sample[extension] = member
    if sample:
        yield current, sample


def _leave_out(left_out: dict[str, str], key: str, reason: str) -> None:
    """Record the reason; a key that is repeated gets a number."""
    name, number = key, 1
    while name in left_out:
        number += 1
        name = f"{key} ({number})"
    left_out[name] = reason


def _split(name: str) -> tuple[str, str]:
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def _image_member(key: str, sample: dict[str, Member], path: Path, image: str | None) -> Member | None:
    if image is not None:
        return sample.get(image)
    images = [extension for extension in sample if extension in EXTENSIONS]
    if len(images) > 1:
        raise UserError(f"sample '{key}' of '{path}' has images {', '.join(images)}; choose with --image EXTENSION")
    return sample[images[0]] if images else None


def _label(fd: int, key: str, sample: dict[str, Member], path: Path, label: str) -> int | None:
    """The class of a sample, None if it has none. Raises UserError."""
    extension, _, field = label.partition(":")
    member = sample.get(extension)
    if member is None:
        return None
    if member.size > MAX_LABEL_BYTES:
        raise UserError(f"sample '{key}' of '{path}': its label .{extension} has {member.size:,} bytes; see --label")
    text = member.start if len(member.start) == member.size else os.pread(fd, member.size, member.offset)
    try:
        value = label_value(json.loads(text)[field] if field else text)
    except (ValueError, KeyError, TypeError):
        value = ""
    if isinstance(value, str):
        raise UserError(f"sample '{key}' of '{path}': {label} is not a class number; see --label")
    return None if value is None else check_class(value, f"sample '{key}' of '{path}'")
