"""The samples of a WebDataset shard, found by its headers alone.

Members that follow each other and share a key are one sample. As in webdataset, the key is the path up to the first dot
of the file's name, and the rest is the extension. Only the picture and the label are looked at; no other member is
read, whatever it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.pictures import SIGNATURE_BYTES, sniff
from data_prep.tar import Member, members
from mimscale.data.decode import EXTENSIONS
from mimscale.data.manifest import Ints
from mimscale.errors import UserError

MAX_LABEL = 1 << 16  # bytes of the member that holds it


class Found(NamedTuple):
    """places: int64 [n, 2], offset and size of each picture. labels: int64 [n] or None. left_out: key -> reason."""

    places: Ints
    labels: Ints | None
    left_out: dict[str, str]


def find_samples(fd: int, path: Path, image: str | None, label: str | None) -> Found:
    """All samples of the shard that is open as `fd`; `path` is for messages.

    image: extension of the picture; None = whichever of the usual ones there is. label: extension of a member with a
    number as text, or json:KEY for a number inside of a json member; None = no labels. Raises UserError.
    """
    places: list[tuple[int, int]] = []
    labels: list[int] = []
    left_out: dict[str, str] = {}
    for key, sample in _samples(fd, path):
        picture = _picture(key, sample, path, image)
        if picture is None:
            left_out[key] = "no picture"
        elif sniff(picture.start[:SIGNATURE_BYTES]) is None:
            left_out[key] = "not a picture"
        else:
            places.append((picture.offset, picture.size))
            if label is not None:
                labels.append(_label(fd, key, sample, path, label))
    return Found(
        np.array(places, dtype=np.int64).reshape(-1, 2),
        None if label is None else np.array(labels, dtype=np.int64),
        left_out,
    )


def _samples(fd: int, path: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    for key, group in groupby(members(fd, path), key=lambda member: _split(member.name)[0]):
        yield key, {_split(member.name)[1]: member for member in group}


def _split(name: str) -> tuple[str, str]:
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def _picture(key: str, sample: dict[str, Member], path: Path, image: str | None) -> Member | None:
    if image is not None:
        return sample.get(image)
    pictures = [extension for extension in sample if extension in EXTENSIONS]
    if len(pictures) > 1:
        raise UserError(f"sample '{key}' of '{path}' has pictures {', '.join(pictures)}; choose with --image EXTENSION")
    return sample[pictures[0]] if pictures else None


def _label(fd: int, key: str, sample: dict[str, Member], path: Path, label: str) -> int:
    extension, _, field = label.partition(":")
    member = sample.get(extension)
    if member is None:
        raise UserError(f"sample '{key}' of '{path}' has no label .{extension}; see --label, or --label none")
    if member.size > MAX_LABEL:
        raise UserError(f"sample '{key}' of '{path}': its label .{extension} has {member.size:,} bytes; see --label")
    text = member.start if len(member.start) == member.size else os.pread(fd, member.size, member.offset)
    try:
        value = json.loads(text)[field] if field else text
        number = int(value)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"sample '{key}' of '{path}': {label} is not a class number; see --label") from None
    if number < 0:
        raise UserError(f"sample '{key}' of '{path}': label {number} is below 0; see --label")
    return number
