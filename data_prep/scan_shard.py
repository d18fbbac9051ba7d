"""Finds the samples of a WebDataset shard from its tar headers.

Consecutive members with the same key are one sample. As in webdataset, the key is the path up to the first dot of the
file name, and the rest is the extension. Only the header of the image and the label are read, and no other member.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.images import SIGNATURE_BYTES, describe_content, sniff
from data_prep.labels import check_class, label_value
from data_prep.tar import File, Member, members, read_at
from mimscale.data.decode import EXTENSIONS
from mimscale.data.manifest import Ints
from mimscale.data.names import one_line
from mimscale.data.sidecars import is_sidecar
from mimscale.errors import UserError

MAX_LABEL_BYTES = 1 << 16  # of the member that holds the label
MAX_EXTENSIONS = 3  # that a reason names
NO_IMAGE = "no image among"  # begins a reason
DOTTED = "a dot in its name: the extension begins at the first dot, so give --image or rename it"
WNID = re.compile(r"(?<![a-z0-9])n\d{8}(?![0-9])")  # the name of a class of ImageNet


class ShardContents(NamedTuple):
    """spans: int64 [n, 2], offset and size of each image. labels: [n] class indices, or names in order of `names`;
    None where a sample has none; the list itself is None if the shard has no labels at all. left_out: key -> reason.
    """

    spans: Ints
    labels: list[int | str | None] | None
    left_out: dict[str, str]
    keys: list[str]

    def without_unlabelled(self) -> ShardContents:
        """The labelled samples only; the others are left out."""
        assert self.labels is not None
        left_out = dict(self.left_out)
        for key, label in zip(self.keys, self.labels, strict=True):
            if label is None:
                leave_out(left_out, key, "no label")
        kept = [label is not None for label in self.labels]
        labels = [label for label in self.labels if label is not None]
        return ShardContents(self.spans[kept], [*labels], left_out, list(compress(self.keys, kept)))


def scan_shard(
    file: File, path: Path | str, image: str | None, label: str | None, names: Collection[str] = ()
) -> ShardContents:
    """All samples of the shard `file`; `path` is for messages.

    image: extension of the image; None = any extension of an image format. label: extension of a member that holds the
    class index as text, json:KEY for a number in a json member, or wnid for the ImageNet name in the sample's key; None
    = no labels. names: of the classes, which a label may give instead of an index; a wnid is always a name. Raises
    UserError.
    """
    spans: list[tuple[int, int]] = []
    labels: list[int | str | None] = []
    left_out: dict[str, str] = {}
    keys: list[str] = []
    apart: set[str] = set()  # keys of labels without an image beside them
    for key, sample in _samples(file, path, left_out):
        member = _image_member(key, sample, path, image)
        if member is None:
            dotted = [name for name in sample if image is None and name.rpartition(".")[2] in EXTENSIONS]
            for name in dotted:
                leave_out(left_out, f"{key}.{name}", DOTTED)
            if not dotted:
                leave_out(left_out, key, _no_image(sample, image))
            if label is not None and label.partition(":")[0] in sample:
                apart.add(_plain(key))
            continue
        if sniff(member.start[:SIGNATURE_BYTES]) is None:
            leave_out(left_out, key, describe_content(member.start))
            continue
        labels.append(None if label is None else _label(file, key, sample, path, label, names))
        spans.append((member.offset, member.size))
        keys.append(key)
    apart |= {_plain(key) for key, times in Counter(map(_plain, keys)).items() if times > 1}
    separate = [key for key, value in zip(keys, labels, strict=True) if value is None and _plain(key) in apart]
    if separate:
        raise UserError(
            f"image and label of {len(separate):,} samples of '{path}' do not stand together, or their name comes "
            f"twice, the first is '{one_line(separate[0])}'; make the shard again with its members sorted by name (tar "
            f"--sort=name)"
        )
    return ShardContents(
        np.array(spans, dtype=np.int64).reshape(-1, 2),
        labels if any(value is not None for value in labels) else None,
        left_out,
        keys,
    )


def _samples(file: File, path: Path | str, left_out: dict[str, str]) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, extension -> member). Members that belong to no sample are passed over, as by webdataset, and recorded.

    A second member with the same key and extension begins another sample, so that none takes the place of the first.
    """
    current, sample = "", dict[str, Member]()
    for member in members(file, path):
        key, extension = _split(member.name)
        if is_sidecar(member.name):
            leave_out(left_out, member.name, "hidden or of the system")
        elif not extension:
            leave_out(left_out, key, "no extension")
        else:
            if sample and (key != current or extension in sample):
                yield current, sample
                sample = {}
            current = key
            sample[extension] = member
    if sample:
        yield current, sample


def _no_image(sample: dict[str, Member], image: str | None) -> str:
    """The reason, with the extensions that were seen: a dot in a name begins the extension."""
    seen = sorted(f".{one_line(extension)[:20]}" for extension in sample)
    more = ", ..." if len(seen) > MAX_EXTENSIONS else ""
    return f"{NO_IMAGE} {', '.join(seen[:MAX_EXTENSIONS])}{more}" + (f", no .{image}" if image else "")


def leave_out(left_out: dict[str, str], key: str, reason: str) -> None:
    """Record the reason; a key that is repeated gets a number."""
    name, number = key, 1
    while name in left_out:
        number += 1
        name = f"{key} ({number})"
    left_out[name] = reason


def _plain(key: str) -> str:
    return key.removeprefix("./")


def _split(name: str) -> tuple[str, str]:
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def _image_member(key: str, sample: dict[str, Member], path: Path | str, image: str | None) -> Member | None:
    if image is not None:
        return sample.get(image)
    images = [extension for extension in sample if extension in EXTENSIONS]
    if len(images) > 1:
        raise UserError(
            f"sample '{one_line(key)}' of '{path}' has images {', '.join(images)}; choose with --image EXTENSION"
        )
    return sample[images[0]] if images else None


def _label(
    file: File, key: str, sample: dict[str, Member], path: Path | str, label: str, names: Collection[str]
) -> int | str | None:
    """The class of a sample, None if it has none. Raises UserError."""
    if label == "wnid":
        found = WNID.search(key)
        return found[0] if found else None
    extension, _, field = label.partition(":")
    member = sample.get(extension)
    if member is None:
        return None
    where = f"sample '{one_line(key)}' of '{path}'"
    if member.size > MAX_LABEL_BYTES:
        raise UserError(f"{where}: its label .{extension} has {member.size:,} bytes; see --label")
    text = member.start if len(member.start) == member.size else read_at(file, member.size, member.offset)
    try:
        value = label_value(_field(text, field) if field else text, names)
    except (ValueError, TypeError, RecursionError):
        value = "?"
    if isinstance(value, str):
        if value in names or (not names and WNID.fullmatch(value)):
            return value
        shown = "" if value == "?" else f": '{one_line(value)[:40]}'"
        raise UserError(f"{where}: {label} is not a class number{shown}; see --label and --classes")
    return None if value is None else check_class(value, where)


def _field(text: bytes, name: str) -> object:
    """A field of an object in JSON; None if it has no such field. Raises ValueError or TypeError."""
    values = json.loads(text)
    if not isinstance(values, dict):
        raise TypeError("no object")
    return values.get(name)
