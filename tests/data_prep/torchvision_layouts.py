"""Each data set's own layout on the disk, small: the formats that torchvision's classes read, with random images."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

Pixels = NDArray[np.uint8]
WNIDS = ["n01443537", "n01629819", "n02056570"]


def pixels(seed: int, count: int, side: int) -> Pixels:
    """uint8 [count, side, side, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def jpeg(path: Path, seed: int) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, 1, 24)[0]).save(path, "JPEG", quality=90)
    return path.read_bytes()


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def cifar(root: Path, kind: type[datasets.CIFAR10], patch: pytest.MonkeyPatch) -> dict[str, tuple[Pixels, list[int]]]:
    """Split -> pixels and labels. The class's list of checksums gets those of the small files."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    names = {"filename": kind.meta["filename"], "key": kind.meta["key"]}
    (folder / names["filename"]).write_bytes(pickle.dumps({names["key"]: ["cat", "dog", "owl"]}))
    patch.setattr(kind, "meta", {**names, "md5": md5(folder / names["filename"])})
    made = {}
    for split, files in (("train", kind.train_list), ("test", kind.test_list)):
        images = pixels(len(split), 2 * len(files), 32)
        labels = [number % 3 for number in range(len(images))]
        checked = []
        for number, (name, _) in enumerate(files):
            part = slice(2 * number, 2 * number + 2)
            rows = images[part].transpose(0, 3, 1, 2).reshape(2, -1)
            key = "labels" if kind is datasets.CIFAR10 else "fine_labels"
            (folder / name).write_bytes(pickle.dumps({"data": rows, key: labels[part]}))
            checked.append([name, md5(folder / name)])
        patch.setattr(kind, f"{split}_list", checked)
        made[split] = images, labels
    return made


def stl10(root: Path, patch: pytest.MonkeyPatch) -> dict[str, Pixels]:
    """Split -> pixels; label i % 3."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    (folder / "class_names.txt").write_text("airplane\nbird\ncar\n")
    made = {}
    for split, count in (("train", 6), ("test", 5), ("unlabeled", 7)):
        made[split] = pixels(count, count, 96)
        (folder / f"{split}_X.bin").write_bytes(made[split].transpose(0, 3, 2, 1).tobytes())
        if split != "unlabeled":
            (folder / f"{split}_y.bin").write_bytes(bytes(1 + number % 3 for number in range(count)))
    for name in ("train_list", "test_list"):
        patch.setattr(datasets.STL10, name, [[f, md5(folder / f)] for f, _ in getattr(datasets.STL10, name)])
    return made


def tiny_imagenet(root: Path, sorted_val: bool) -> dict[str, bytes]:
    """Name of each validation image -> its bytes; val_0 is of the last class."""
    folder, made = root / "tiny-imagenet-200", {}
    for label, wnid in enumerate(WNIDS):
        for number in range(2):
            jpeg(folder / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", 10 * label + number)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t9\t9\n")
    rows = []
    for number, wnid in enumerate(reversed(WNIDS)):
        name = f"val_{number}.JPEG"
        place = folder / "val" / (wnid if sorted_val else "") / "images" / name
        made[name] = jpeg(place, 50 + number)
        rows.append(f"{name}\t{wnid}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))
    return made


def food101(root: Path) -> dict[str, tuple[bytes, int]]:
    """Stem of each image of the two splits -> bytes, label."""
    folder, made = root / "food-101", {}
    (folder / "meta").mkdir(parents=True)
    for split, first in (("train", 0), ("test", 2)):
        lists = {name: [f"{name}/{first + n}" for n in range(2)] for name in ("waffles", "baklava")}
        (folder / "meta" / f"{split}.json").write_text(json.dumps(lists))
        for label, name in enumerate(sorted(lists)):
            for stem in lists[name]:
                made[stem] = jpeg(folder / "images" / f"{stem}.jpg", hash_of(stem)), label
    return made


def pets(root: Path) -> dict[str, tuple[bytes, int]]:
    folder, made = root / "oxford-iiit-pet", {}
    (folder / "annotations").mkdir(parents=True)
    for split, first in (("trainval", 0), ("test", 2)):
        lines = []
        for label, name in enumerate(("Abyssinian", "american_bulldog")):
            for number in range(first, first + 2):
                stem = f"{name}_{number}"
                lines.append(f"{stem} {label + 1} {label + 1} 1\n")
                made[stem] = jpeg(folder / "images" / f"{stem}.jpg", hash_of(stem)), label
        (folder / "annotations" / f"{split}.txt").write_text("".join(lines))
    return made


def flowers102(root: Path, patch: pytest.MonkeyPatch) -> dict[str, tuple[bytes, int]]:
    folder, made = root / "flowers-102", {}
    labels = [102, 1, 2, 5, 102, 1, 2]  # of images 1 to 7
    for number, label in enumerate(labels, 1):
        stem = f"image_{number:05d}"
        made[stem] = jpeg(folder / "jpg" / f"{stem}.jpg", number), label - 1
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels])})
    savemat(folder / "setid.mat", {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 6, 7]]})
    files = datasets.Flowers102._file_dict
    checked = {k: (name, md5(folder / name) if k != "image" else old) for k, (name, old) in files.items()}
    patch.setattr(datasets.Flowers102, "_file_dict", checked)
    return made


def cars(root: Path) -> dict[str, tuple[bytes, int]]:
    folder, made = root / "stanford_cars", {}
    (folder / "devkit").mkdir(parents=True)
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], dtype=object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    place = {"train": folder / "devkit" / "cars_train_annos.mat", "test": folder / "cars_test_annos_withlabels.mat"}
    for split, file in place.items():
        rows = np.zeros(3, dtype=[("fname", object), ("class", object)])
        for number in range(3):
            name = f"{split}{number:05d}.jpg"
            rows[number] = (name, np.uint8(1 + number % 2))
            made[name[:-4]] = jpeg(folder / f"cars_{split}" / name, hash_of(name)), number % 2
        savemat(file, {"annotations": rows})
    return made


def dtd(root: Path) -> dict[str, tuple[bytes, int]]:
    folder, made = root / "dtd" / "dtd", {}
    (folder / "labels").mkdir(parents=True)
    for part, split in enumerate(("train", "val", "test")):
        lines = []
        for label, name in enumerate(("banded", "zigzagged")):
            stem = f"{name}_{part:04d}"
            lines.append(f"{name}/{stem}.jpg\n")
            made[stem] = jpeg(folder / "images" / name / f"{stem}.jpg", hash_of(stem)), label
        (folder / "labels" / f"{split}1.txt").write_text("".join(lines))
    return made


def aircraft(root: Path) -> dict[str, tuple[bytes, int]]:
    folder, made = root / "fgvc-aircraft-2013b" / "data", {}
    folder.mkdir(parents=True)
    variants = ["707-320", "Boeing 717"]
    (folder / "variants.txt").write_text("\n".join(variants) + "\n")
    for first, split in enumerate(("trainval", "test")):
        lines = []
        for label, name in enumerate(variants):
            stem = f"{first}{label}00001"
            lines.append(f"{stem} {name}\n")
            made[stem] = jpeg(folder / "images" / f"{stem}.jpg", int(stem)), label
        (folder / f"images_variant_{split}.txt").write_text("".join(lines))
    return made


FILES = {"food101": food101, "pets": pets, "cars": cars, "dtd": dtd, "aircraft": aircraft}
COUNTS = {"food101": (4, 4), "pets": (4, 4), "cars": (3, 3), "dtd": (4, 2), "aircraft": (2, 2), "flowers102": (4, 3)}
"""Images in train and in val."""


def hash_of(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:6], 16)
