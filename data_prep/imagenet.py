"""Sources: the official ImageNet-1k (ILSVRC2012) archives, read in place, without unpacking.

Class index = place of the wnid in sorted order, as in torchvision and timm. The validation ground truth counts in the
devkit's ILSVRC2012_ID, which is another order; the synset list or the devkit's meta.mat translates.
"""

from __future__ import annotations

import csv
import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_prep.plan import BLOCK, SIGNATURE_BYTES, Item, Source, padded, sniff, unique_keys
from mimscale.errors import UserError

DEVKIT_META = "data/meta.mat"
DEVKIT_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"


class Member(NamedTuple):
    """A file inside an archive: `size` bytes at `offset` of the (outer) archive."""

    name: str
    offset: int
    size: int


def read_train(archive: Path) -> Source:
    """ILSVRC2012_img_train.tar: one inner tar per class, named by its wnid. Raises UserError."""
    found: list[tuple[Member, str]] = []
    with _open(archive) as file:
        size = os.fstat(file.fileno()).st_size
        inner = list(_members(file, archive, 0, size))
        for outer in inner:
            wnid, extension = os.path.splitext(os.path.basename(outer.name))
            if extension != ".tar":
                raise UserError(f"'{archive}' holds '{outer.name}', not one tar per class; is it the train archive?")
            found += [(member, wnid) for member in _members(file, archive, outer.offset, outer.offset + outer.size)]
    return _source(archive, "imagenet train", found)


def read_val(archive: Path, truth: Path, synsets: Path | None) -> Source:
    """ILSVRC2012_img_val.tar and its labels, see `read_truth`. Raises UserError, also where the two do not match."""
    wnid_of = read_truth(truth, synsets)
    with _open(archive) as file:
        members = list(_members(file, archive, 0, os.fstat(file.fileno()).st_size))
    names = {os.path.splitext(os.path.basename(member.name))[0]: member for member in members}
    if names.keys() != wnid_of.keys():
        odd = sorted(names.keys() ^ wnid_of.keys())[0]
        raise UserError(
            f"'{archive}' has {len(names):,} pictures, '{truth}' labels {len(wnid_of):,}; '{odd}' is in only one"
        )
    return _source(archive, "imagenet val", [(member, wnid_of[name]) for name, member in names.items()])


def read_truth(truth: Path, synsets: Path | None) -> dict[str, str]:
    """Picture name -> wnid, from one of

    - LOC_val_solution.csv (Kaggle): ImageId, then the wnid as first word of PredictionString;
    - ILSVRC2012_devkit_t12.tar.gz: ground truth and meta.mat (needs scipy);
    - ILSVRC2012_validation_ground_truth.txt with `synsets`, a file of wnids of which line i is ILSVRC2012_ID i.
    """
    try:
        if truth.suffix == ".csv":
            with open(truth, newline="") as file:
                return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
        if truth.name.endswith((".tar", ".tar.gz", ".tgz")):
            with tarfile.open(truth) as devkit:
                wnids = _leaves(_extract(devkit, DEVKIT_META))
                text = _extract(devkit, DEVKIT_TRUTH).decode()
        else:
            if synsets is None:
                raise UserError(
                    f"ground truth '{truth}' counts in devkit ids; add --synsets FILE (line i = wnid of id i)"
                )
            wnids = dict(enumerate((line.split()[0] for line in synsets.read_text().splitlines() if line.strip()), 1))
            text = truth.read_text()
        ids = [int(line) for line in text.split()]
        return {f"ILSVRC2012_val_{number:08d}": wnids[devkit_id] for number, devkit_id in enumerate(ids, 1)}
    except UserError:
        raise
    except KeyError as error:
        raise UserError(
            f"ground truth '{truth}': {error} is not in it or in the synset list; is it the right file?"
        ) from None
    except (OSError, ValueError, IndexError, AttributeError, tarfile.TarError) as error:
        raise UserError(f"ground truth '{truth}' cannot be read: {error}") from None


def _leaves(meta: bytes) -> dict[int, str]:
    """ILSVRC2012_ID -> wnid of the synsets without children: the classes. The others are their ancestors."""
    from scipy.io import loadmat

    synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    return {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}


def _extract(devkit: tarfile.TarFile, ending: str) -> bytes:
    name = next((name for name in devkit.getnames() if name.endswith(ending)), None)
    file = devkit.extractfile(name) if name else None
    if file is None:
        raise UserError(
            f"'{devkit.name!r}' holds no {ending}; give ILSVRC2012_devkit_t12.tar.gz, or a text or csv file"
        )
    return file.read()


def _open(archive: Path) -> BinaryIO:
    try:
        return open(archive, "rb")
    except OSError as error:
        raise UserError(f"archive '{archive}' cannot be read: {error.strerror}") from None


def _members(file: BinaryIO, archive: Path, start: int, end: int) -> Iterator[Member]:
    """The files of the tar that lies at [start, end) of an open file; only headers are read.

    tarfile takes a damaged header for the end of the archive, and a missing end for an end. Here only the empty block
    that every tar program writes is one, so that half a download is not half a data set.
    """
    after = start
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                after = info.offset_data + padded(info.size)
                if after > end:
                    break
                if info.isreg():
                    yield Member(info.name, info.offset_data, info.size)
    except tarfile.TarError:
        pass  # the check below says where
    if after + BLOCK > end or any(os.pread(file.fileno(), BLOCK, after)):
        raise UserError(f"'{archive}' is not a whole tar archive: no end where one should be, at byte {after:,}")


def _source(archive: Path, kind: str, found: list[tuple[Member, str]]) -> Source:
    classes = sorted({wnid for _, wnid in found})
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    skipped: Counter[str] = Counter()
    found.sort()
    items = []
    with _open(archive) as file:
        keys = unique_keys(os.path.splitext(os.path.basename(member.name))[0] for member, _ in found)
        for key, (member, wnid) in zip(keys, found, strict=True):
            extension = sniff(os.pread(file.fileno(), SIGNATURE_BYTES, member.offset))
            if extension is None:
                skipped["without an image's content"] += 1
            else:
                items.append(Item(key, extension, label_of[wnid], str(archive), member.offset, member.size))
    return Source({"kind": kind, "path": str(archive)}, items, classes, skipped)
