"""Sources: ImageNet's official archives, read in place, without unpacking.

Class index = place of the wnid in sorted order, as in torchvision and timm.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from data_prep.pictures import SIGNATURE_BYTES, sniff
from data_prep.plan import Item, Source, unique_keys
from data_prep.tar import Member, members, opened
from data_prep.truth import read_truth
from mimscale.errors import UserError

MD5 = {  # of the files as they are downloaded; torchvision and image-net.org name the same
    "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
    "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
    "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
}
FULL = {  # kind of source -> pictures, classes
    "imagenet train": (1_281_167, 1000),
    "imagenet val": (50_000, 1000),
}
CHUNK = 4 << 20


class Found(NamedTuple):
    """A picture in an archive; sorts by name."""

    name: str
    wnid: str
    path: str
    offset: int
    size: int


def read_train(archive: Path) -> Source:
    """ILSVRC2012_img_train.tar: one inner tar per class, named by its wnid. Raises UserError."""
    return _class_archives(archive, "imagenet train")


def read_21k(source: Path) -> Source:
    """ImageNet-21K: fall11_whole.tar (a tar per class inside), or a folder of wnid.tar (what the winter-2021 release
    unpacks to, or what was fetched class by class). Classes are those of the files. Raises UserError.
    """
    if not source.is_dir():
        return _class_archives(source, "imagenet-21k")
    archives = sorted(source.rglob("*.tar"))
    if not archives:
        raise UserError(f"source '{source}' holds no wnid.tar; for folders of pictures use the verb folder")
    gather = _Gather()
    for archive in archives:
        with opened(archive) as fd:
            gather.add(archive.stem, archive, members(fd, archive))
    return gather.source("imagenet-21k", source)


def read_val(archive: Path, truth: Path, synsets: Path | None) -> Source:
    """ILSVRC2012_img_val.tar and its labels, see `read_truth`. Raises UserError, also where the two do not match."""
    wnid_of = read_truth(truth, synsets)
    gather = _Gather()
    with opened(archive) as fd:
        pictures = {_stem(member.name): member for member in members(fd, archive)}
    if pictures.keys() != wnid_of.keys():
        odd = sorted(pictures.keys() ^ wnid_of.keys())[0]
        raise UserError(
            f"'{archive}' has {len(pictures):,} pictures, '{truth}' labels {len(wnid_of):,}; '{odd}' is in only one"
        )
    for name, member in pictures.items():
        gather.add(wnid_of[name], archive, [member])
    return gather.source("imagenet val", archive)


def check_md5(paths: Iterable[Path], advance: Callable[[int], None] = lambda length: None) -> None:
    """Read the files whole and compare with the known checksums. advance: called with bytes. Raises UserError."""
    for path in paths:
        expected = MD5.get(path.name)
        if expected is None:
            raise UserError(f"--md5: no checksum is known for '{path.name}', only for {', '.join(MD5)}")
        digest = hashlib.md5(usedforsecurity=False)
        with opened(path) as fd:
            while chunk := os.read(fd, CHUNK):
                digest.update(chunk)
                advance(len(chunk))
        if digest.hexdigest() != expected:
            raise UserError(f"'{path}' has md5 {digest.hexdigest()}, not {expected}; download it again")


class _Gather:
    """Pictures of many archives, and the classes that these stand for, also empty ones."""

    def __init__(self) -> None:
        self.found: list[Found] = []
        self.wnids: set[str] = set()
        self.skipped: Counter[str] = Counter()

    def add(self, wnid: str, path: Path, pictures: Iterable[Member]) -> None:
        self.wnids.add(wnid)
        for name, offset, size, start in pictures:
            if sniff(start[:SIGNATURE_BYTES]) is None:
                self.skipped["without an image's content"] += 1
            else:
                self.found.append(Found(name, wnid, str(path), offset, size))

    def source(self, kind: str, path: Path) -> Source:
        classes = sorted(self.wnids)
        label_of = {wnid: label for label, wnid in enumerate(classes)}
        self.found.sort()
        keys = unique_keys(_stem(picture.name) for picture in self.found)
        items = [
            Item(key, label_of[wnid], source, offset, size)
            for key, (_, wnid, source, offset, size) in zip(keys, self.found, strict=True)
        ]
        return Source({"kind": kind, "path": str(path)}, items, classes, self.skipped)


def _class_archives(archive: Path, kind: str) -> Source:
    gather = _Gather()
    with opened(archive) as fd:
        if os.pread(fd, 2, 0) == b"\x1f\x8b":
            raise UserError(
                f"'{archive}' is compressed, so it cannot be read in place; `tar -xzf` it and give the folder of tars"
            )
        for outer in members(fd, archive):
            wnid, extension = _stem(outer.name), os.path.splitext(outer.name)[1]
            if extension != ".tar":
                raise UserError(f"'{archive}' holds '{outer.name}', not one tar per class; is it the right archive?")
            gather.add(wnid, archive, members(fd, archive, outer.offset, outer.offset + outer.size))
    return gather.source(kind, archive)


def _stem(name: str) -> str:
    return os.path.splitext(os.path.basename(name))[0]
