"""Sources: ImageNet's official archives, read without unpacking.

The class index is the index of the wnid in sorted order, as in torchvision and timm.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from data_prep.images import SIGNATURE_BYTES, sniff
from data_prep.plan import Item, Source, unique_keys
from data_prep.shard_list import PACKED
from data_prep.tar import Member, members, open_for_reading
from data_prep.val_labels import read_val_labels
from data_prep.walk import files_below
from mimscale.data.names import one_line
from mimscale.data.sidecars import is_sidecar
from mimscale.errors import UserError
from mimscale.files.progress import no_progress

MD5 = {  # of the downloaded files; the same values as in torchvision and on image-net.org
    "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
    "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
    "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
}
FULL_SIZE = {  # kind of source -> (images, classes)
    "imagenet train": (1_281_167, 1000),
    "imagenet val": (50_000, 1000),
    "fashion train": (60_000, 10),
    "fashion val": (10_000, 10),
}
CHUNK = 4 << 20


class ArchiveImage(NamedTuple):
    """An image in an archive; sorted by name."""

    name: str
    wnid: str
    path: str
    offset: int
    size: int


def read_train(archive: Path, done: Callable[[int], None] = no_progress) -> Source:
    """ILSVRC2012_img_train.tar: one inner tar per class, named by its wnid. Raises UserError."""
    return _class_archives(archive, "imagenet train", done)


def read_21k(source: Path, done: Callable[[int], None] = no_progress) -> Source:
    """ImageNet-21K: fall11_whole.tar (contains one tar per class), or a folder of wnid.tar (the unpacked winter-2021
    release, or archives that were downloaded per class). The classes are those of the source. Raises UserError.
    """
    if not source.is_dir():
        return _class_archives(source, "imagenet-21k", done)
    images = _ImageList(done)
    found = [source / name for name in files_below(source, images.skipped)]
    for path in (path for path in found if PACKED.fullmatch(path.name)):
        raise UserError(f"'{path}' is compressed, and its class would be left out; unpack it to {path.stem}")
    archives = sorted(path for path in found if path.suffix.lower() == ".tar")
    if not archives:
        raise UserError(f"source '{source}' holds no wnid.tar; for folders of images use the verb folder")
    images.skipped["that are no .tar"] += len(found) - len(archives)
    for archive in archives:
        with open_for_reading(archive) as fd:
            images.add(archive.stem, archive, members(fd, archive))
    return images.source("imagenet-21k", source)


def read_val(archive: Path, truth: Path, synsets: Path | None, done: Callable[[int], None] = no_progress) -> Source:
    """ILSVRC2012_img_val.tar, or a flat folder of its files, with labels, see `read_val_labels`.

    Raises UserError, also if they do not match.
    """
    wnid_of = read_val_labels(truth, synsets)
    images = _ImageList(done)
    member_of: dict[str, Member] = {}
    with nullcontext() if archive.is_dir() else open_for_reading(archive) as fd:
        found = list(_flat_files(archive, images.skipped) if fd is None else members(fd, archive))
    for member in sorted(found, key=_is_image, reverse=True):
        name = _stem(member.name)
        if not _is_image(member) and (is_sidecar(member.name) or name in member_of or name not in wnid_of):
            images.takes(member)
        elif name in member_of:
            raise UserError(f"'{archive}' has several images '{one_line(name)}'; keep one of them")
        else:
            member_of[name] = member
    if member_of.keys() != wnid_of.keys():
        odd = sorted(member_of.keys() ^ wnid_of.keys())[0]
        raise UserError(
            f"'{archive}' has {len(member_of):,} images, '{truth}' labels {len(wnid_of):,}; '{one_line(odd)}' is in "
            "only one"
        )
    for name, member in member_of.items():
        images.add(wnid_of[name], archive / member.name if archive.is_dir() else archive, [member])
    return images.source("imagenet val", archive)


def check_md5(paths: Iterable[Path], advance: Callable[[int], None] = no_progress) -> None:
    """Compare the files with the known checksums. advance: called with bytes that were read. Raises UserError."""
    for path in paths:
        expected = MD5.get(path.name)
        if expected is None:
            raise UserError(f"--md5: no checksum is known for '{path.name}', only for {', '.join(MD5)}")
        digest = hashlib.md5(usedforsecurity=False)
        with open_for_reading(path) as fd:
            while chunk := os.read(fd, CHUNK):
                digest.update(chunk)
                advance(len(chunk))
        if digest.hexdigest() != expected:
            raise UserError(f"'{path}' has md5 {digest.hexdigest()}, not {expected}; download it again")


class _ImageList:
    """Images of several archives, with all classes, also those without images."""

    def __init__(self, done: Callable[[int], None]) -> None:
        self._done = done
        self.images: list[ArchiveImage] = []
        self.wnids: set[str] = set()
        self.skipped: Counter[str] = Counter()

    def add(self, wnid: str, path: Path, files: Iterable[Member]) -> None:
        """Add the files that are images to a class; count the others as skipped."""
        self.wnids.add(wnid)
        for member in files:
            self._done(1)
            if self.takes(member):
                self.images.append(ArchiveImage(member.name, wnid, str(path), member.offset, member.size))

    def takes(self, member: Member) -> bool:
        """Whether it is an image; others are counted."""
        if is_sidecar(member.name):
            self.skipped["hidden or of the system"] += 1
        elif not _is_image(member):
            self.skipped["without an image's content"] += 1
        else:
            return True
        return False

    def source(self, kind: str, path: Path) -> Source:
        classes = sorted(self.wnids)
        label_of = {wnid: label for label, wnid in enumerate(classes)}
        self.images.sort()
        keys = unique_keys(_stem(image.name) for image in self.images)
        items = [
            Item(key, label_of[wnid], source, offset, size)
            for key, (_, wnid, source, offset, size) in zip(keys, self.images, strict=True)
        ]
        return Source({"kind": kind, "path": str(path)}, items, classes, +self.skipped)


def _class_archives(archive: Path, kind: str, done: Callable[[int], None]) -> Source:
    images = _ImageList(done)
    with open_for_reading(archive) as fd:
        if os.pread(fd, 2, 0) == b"\x1f\x8b":
            raise UserError(
                f"'{archive}' is compressed, so its members cannot be read; `tar -xzf` it and give the folder of tars"
            )
        for outer in members(fd, archive):
            if is_sidecar(outer.name):
                images.skipped["hidden or of the system"] += 1
                continue
            wnid, extension = _stem(outer.name), os.path.splitext(outer.name)[1]
            if extension != ".tar":
                raise UserError(f"'{archive}' holds '{outer.name}', not one tar per class; give the right archive")
            images.add(wnid, archive, members(fd, archive, outer.offset, outer.offset + outer.size))
    return images.source(kind, archive)


def _is_image(member: Member) -> bool:
    return not is_sidecar(member.name) and sniff(member.start[:SIGNATURE_BYTES]) is not None


def _flat_files(folder: Path, skipped: Counter[str]) -> Iterator[Member]:
    """The files of a folder, as members at offset 0 of a file each. Raises UserError."""
    for path in sorted(folder.iterdir()):
        if not path.is_file():
            skipped["no regular file"] += 1
            continue
        try:
            with open(path, "rb") as file:
                yield Member(path.name, 0, os.fstat(file.fileno()).st_size, file.read(SIGNATURE_BYTES))
        except OSError as error:
            raise UserError(f"source file '{path}' cannot be read: {error.strerror}") from None


def _stem(name: str) -> str:
    return os.path.splitext(os.path.basename(name))[0]
