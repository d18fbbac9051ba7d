"""Sources: the data sets of the transfer tables, as torchvision's classes find them on the disk.

Which images a model learns from and which it is measured on follows the usual protocol (Kornblith et al., CVPR 2019,
arXiv 1805.08974, table 1; STL-10 and Tiny ImageNet: the splits that their authors made). Where a data set has an
official validation set beside a labelled test set, both train and val are learned from, and hyper-parameters are chosen
inside them: the evaluation protocols hold out their own part. The metric of each set is stored in its manifest.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep import png_rows
from data_prep.plan import Item, Source, unique_keys
from data_prep.reports import SHOWN
from mimscale.data.names import one_line
from mimscale.errors import UserError, nearest

Sample = tuple[str, int]  # path of a file, label
Read = Callable[[Path, str, bool], tuple[list[Item], list[str]]]
FLOWERS = 102
TOP1, PER_CLASS = "top-1", "mean per-class"  # names of metrics, as mimscale.evals reads them from a manifest
UNLABELLED = "unlabelled"


@dataclass(frozen=True)
class DataSet:
    """One data set. read: (root, torchvision's split, download) -> items without key and the names of the classes.

    splits: name of ours -> torchvision's splits that it joins. place: its folder in the root. metric: of its tables.
    downloads: whether torchvision can fetch it.
    """

    read: Read
    splits: Mapping[str, tuple[str, ...]]
    place: str
    metric: str = TOP1
    downloads: bool = True


def read_sets(name: str, root: Path, only: str | None = None, download: bool = False) -> dict[str, Source]:
    """Our split -> its source. root: the folder that torchvision's class takes. only: this split, None for all.

    Raises UserError for an unknown name and for files that are missing, damaged or of another data set.
    """
    if name not in SETS:
        raise UserError(f"torchvision {name}: no such data set{nearest(name, list(SETS))}")
    kind = SETS[name]
    if download and not kind.downloads:
        raise UserError(f"--download: torchvision has no download of {name}; unpack it into '{root / kind.place}'")
    if not root.is_dir() and not download:
        raise UserError(f"source '{root}': no such folder")
    if only is not None and only not in kind.splits:
        raise UserError(f"--split {only}: {name} has the splits {', '.join(kind.splits)}")
    sources: dict[str, Source] = {}
    for split, parts in kind.splits.items():
        if only not in (None, split):
            continue
        items: list[Item] = []
        classes: list[str] = []
        for part in parts:
            found, names = _read(kind, name, root, part, download)
            if classes and names != classes:
                raise _different(root, name, classes, names)
            items, classes = items + found, names
        labelled = split != UNLABELLED
        before = next((source.classes for source in sources.values() if source.classes), classes)
        if labelled and classes != before:
            raise _different(root, name, before, classes)
        if labelled and max(item.label for item in items) >= len(classes):
            raise UserError(f"'{root}': {name} has a label above its {len(classes)} classes; get its files again")
        keys = unique_keys(_relative(item, root) for item in items)
        items = [item._replace(key=key) for item, key in zip(items, keys, strict=True)]
        about = {"kind": f"torchvision {name} {split}", "path": str(root), "metric": kind.metric}
        rows = items[0].column.startswith(png_rows.PREFIX)
        encoder = png_rows.encoder() if rows else None
        sources[split] = Source(about, items, classes if labelled else None, png_encoder=encoder)
    return sources


def _different(root: Path, name: str, first: list[str], second: list[str]) -> UserError:
    differ = sorted(set(first) ^ set(second))
    what = f"'{differ[0]}' is in one of them only" if differ else "their order differs"
    return UserError(f"'{root}': the splits of {name} have different classes: {what}; get its files again")


def _read(kind: DataSet, name: str, root: Path, split: str, download: bool) -> tuple[list[Item], list[str]]:
    try:
        items, classes = kind.read(root, split, download)
    except RuntimeError:  # torchvision's words for this differ from class to class
        raise UserError(
            f"'{root}' lacks {name} or holds a damaged copy; torchvision reads it from '{root / kind.place}': put it "
            "there"
        ) from None
    except (UserError, ImportError):
        raise
    except Exception as error:  # torchvision, scipy and pickle each have errors of their own for a damaged file
        raise UserError(f"'{root / kind.place}' cannot be read as {name} ({error}); get its files again") from None
    if not items:
        raise UserError(f"'{root / kind.place}' lists no image of {name} {split}; get its files again")
    return items, [one_line(str(text)) for text in classes]


def _relative(item: Item, root: Path) -> str:
    """What the key is made of: the path below the root without extension, and the row in a file of many images."""
    stem = os.path.splitext(os.path.relpath(item.path, root))[0]
    return f"{stem}/{item.offset:06d}" if item.column else stem


def _files(samples: Iterable[Sample]) -> list[Item]:
    """Whole files. Raises UserError, which counts those that are missing."""
    items, missing = [], []
    for path, label in samples:
        try:
            items.append(Item("", int(label), str(path), 0, os.stat(path).st_size))
        except OSError:
            missing.append(str(path))
    if missing:
        shown = ", ".join(f"'{one_line(path)}'" for path in missing[:SHOWN])
        more = ", ..." if len(missing) > SHOWN else ""
        raise UserError(f"{len(missing):,} listed images do not exist: {shown}{more}; unpack the archive again")
    return items


def _path(path: Any) -> str:
    """In place of a loader: a data set's samples are then paths, and nothing is decoded."""
    return str(path)


def _listed(kind: Any, root: Path, **options: Any) -> tuple[list[Item], list[str]]:
    """The files and classes of one of torchvision's data sets. Pets takes no loader, and of older versions (0.21) no
    class does: their lists are read.
    """
    if "loader" in inspect.signature(kind).parameters:
        found = kind(root, loader=_path, **options)
        samples = [found[number] for number in range(len(found))]
    else:
        found = kind(root, **options)
        files = getattr(found, "_image_files", None) or getattr(found, "_images", None)
        samples = found._samples if files is None else list(zip(files, found._labels, strict=True))
    names = getattr(found, "classes", None)  # Flowers102 of 0.21 has none
    return _files(samples), list(names or map(str, range(1, FLOWERS + 1)))


def _rows(path: Path, labels: Sequence[int], column: str, size: int) -> list[Item]:
    return [Item("", int(label), str(path), row, size, column) for row, label in enumerate(labels)]


def _cifar10(root: Path, split: str, download: bool) -> tuple[list[Item], list[str]]:
    from torchvision.datasets import CIFAR10

    found = CIFAR10(root, train=split == "train", download=download)
    column = png_rows.CIFAR_TRAIN if split == "train" else png_rows.CIFAR_TEST
    return _rows(root / found.base_folder, found.targets, column, found.data[0].size), list(found.classes)


def _cifar100(root: Path, split: str, download: bool) -> tuple[list[Item], list[str]]:
    from torchvision.datasets import CIFAR100

    found = CIFAR100(root, train=split == "train", download=download)
    column = png_rows.CIFAR100_TRAIN if split == "train" else png_rows.CIFAR100_TEST
    return _rows(root / found.base_folder, found.targets, column, found.data[0].size), list(found.classes)


def _stl10(root: Path, split: str, download: bool) -> tuple[list[Item], list[str]]:
    """The checksums of all files are compared by making one data set; its large file is then mapped."""
    from torchvision.datasets import STL10

    labelled = STL10(root, split="train" if split == "unlabeled" else split, download=download)
    folder, size = root / labelled.base_folder, labelled.data[0].size
    images = folder / f"{split}_X.bin"
    labels = [-1] * (images.stat().st_size // size) if split == "unlabeled" else labelled.labels
    if not hasattr(labelled, "classes"):
        raise UserError(f"'{folder}' lacks {labelled.class_names_file}, the names of the classes; unpack it again")
    return _rows(images, labels, png_rows.STL10, size), list(labelled.classes)


def _tiny_imagenet(root: Path, split: str, download: bool) -> tuple[list[Item], list[str]]:
    """train/WNID/images/*.JPEG. val: the same, where it was sorted into classes, else by val_annotations.txt."""
    from torchvision.datasets import ImageFolder

    below = root / TINY
    folder = below if below.is_dir() else root
    annotations = folder / split / "val_annotations.txt"
    if split == "val" and (folder / split / "images").is_dir():
        classes = ImageFolder(str(folder / "train"), loader=_path).classes
        label_of = {wnid: label for label, wnid in enumerate(classes)}
        rows = [line.split("\t") for line in annotations.read_text().splitlines() if line.strip()]
        return _files((str(folder / split / "images" / row[0]), label_of[row[1]]) for row in rows), classes
    found = ImageFolder(str(folder / split), loader=_path)
    return _files(found.samples), list(found.classes)


def _class(name: str, **options: Any) -> Read:
    """Of torchvision's class of this name, which takes root, split and download."""

    def read(root: Path, split: str, download: bool) -> tuple[list[Item], list[str]]:
        import torchvision.datasets

        return _listed(getattr(torchvision.datasets, name), root, split=split, download=download, **options)

    return read


TINY = "tiny-imagenet-200"
TRAIN_TEST = {"train": ("train",), "val": ("test",)}
JOINED = {"train": ("train", "val"), "val": ("test",)}
TRAINVAL = {"train": ("trainval",), "val": ("test",)}
SETS = {
    "cifar10": DataSet(_cifar10, TRAIN_TEST, "cifar-10-batches-py"),
    "cifar100": DataSet(_cifar100, TRAIN_TEST, "cifar-100-python"),
    "stl10": DataSet(_stl10, {**TRAIN_TEST, UNLABELLED: ("unlabeled",)}, "stl10_binary"),
    "tiny_imagenet": DataSet(_tiny_imagenet, {"train": ("train",), "val": ("val",)}, TINY, downloads=False),
    "food101": DataSet(_class("Food101"), TRAIN_TEST, "food-101"),
    "pets": DataSet(_class("OxfordIIITPet"), TRAINVAL, "oxford-iiit-pet", PER_CLASS),
    "flowers102": DataSet(_class("Flowers102"), JOINED, "flowers-102", PER_CLASS),
    "cars": DataSet(_class("StanfordCars"), TRAIN_TEST, "stanford_cars", downloads=False),
    "dtd": DataSet(_class("DTD", partition=1), JOINED, "dtd"),
    "aircraft": DataSet(_class("FGVCAircraft"), TRAINVAL, "fgvc-aircraft-2013b", PER_CLASS),
}
SIZES = {  # kind of source -> (images, classes) of the official data
    f"torchvision {name} {split}": (count, 0 if split == UNLABELLED else classes)
    for name, classes, counts in (
        ("cifar10", 10, {"train": 50_000, "val": 10_000}),
        ("cifar100", 100, {"train": 50_000, "val": 10_000}),
        ("stl10", 10, {"train": 5_000, "val": 8_000, UNLABELLED: 100_000}),
        ("tiny_imagenet", 200, {"train": 100_000, "val": 10_000}),
        ("food101", 101, {"train": 75_750, "val": 25_250}),
        ("pets", 37, {"train": 3_680, "val": 3_669}),
        ("flowers102", 102, {"train": 2_040, "val": 6_149}),
        ("cars", 196, {"train": 8_144, "val": 8_041}),
        ("dtd", 47, {"train": 3_760, "val": 1_880}),
        ("aircraft", 100, {"train": 6_667, "val": 3_333}),
    )
    for split, count in counts.items()
}
