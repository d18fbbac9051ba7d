"""Source: a folder tree of images."""

from __future__ import annotations

import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_prep.images import SIGNATURE_BYTES, sniff
from data_prep.plan import Item, Source, unique_keys
from data_prep.splits import check_classes
from mimscale.data.decode import EXTENSIONS
from mimscale.data.sidecars import is_sidecar
from mimscale.errors import UserError

PROBE_THREADS = 16  # opening a file on a network file system is mostly waiting


def read_folder(root: Path, labelled: bool) -> Source:
    """Labelled: the sub-folders of `root` are the classes, in sorted order, as torchvision's ImageFolder has them.

    Unlabelled: all images below `root`. An image is a file with the extension and the first bytes of an image; the
    first bytes decide its format. Raises UserError.
    """
    if not root.is_dir():
        raise UserError(f"source '{root}': no such folder")
    skipped: Counter[str] = Counter()
    names = sorted(_image_names(root, skipped))
    classes = _classes(root) if labelled else None
    if classes is not None:
        inside = [name for name in names if os.sep in name]
        skipped["outside of the class folders"] += len(names) - len(inside)
        names = inside
    with ThreadPoolExecutor(PROBE_THREADS) as pool:
        probed = list(pool.map(lambda name: probe(root / name), names))
    keys = unique_keys(os.path.splitext(name)[0] for name in names)
    label_of = {name: label for label, name in enumerate(classes or [])}
    items = []
    for name, key, (is_image, size) in zip(names, keys, probed, strict=True):
        if not is_image:
            skipped["without an image's content"] += 1
        else:
            label = label_of.get(name.split(os.sep, 1)[0], -1)
            items.append(Item(key, label, str(root / name), 0, size))
    empty = set(label_of.values()) - {item.label for item in items}
    if classes and empty:
        raise UserError(f"class folder '{root / classes[min(empty)]}' holds no image; fill it or remove it")
    return Source({"kind": "folder", "path": str(root)}, items, classes, +skipped)


def _classes(root: Path) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not is_sidecar(entry.name))
    if not names:
        raise UserError(f"source '{root}' has no class sub-folders; for images without classes add --unlabelled")
    check_classes(root, names)
    return names


def _image_names(root: Path, skipped: Counter[str]) -> list[str]:
    """Paths, relative to root, of all files with an image's extension.

    Each folder (device, inode) is walked once: first the real ones, then those that links lead to. A file that is
    reached by several paths is kept and counted.
    """
    names: list[str] = []
    links, walked, files_seen, again = [str(root)], set[tuple[int, int]](), set[tuple[int, int]](), 0
    while links:
        start, links = links, []
        for top in start:
            for folder, folders, files in os.walk(top):
                if _seen(folder, walked):
                    skipped["folders reached a second time"] += 1
                    folders.clear()
                    continue
                paths = {name: os.path.join(folder, name) for name in sorted(folders) if not is_sidecar(name)}
                links += [path for path in paths.values() if os.path.islink(path)]
                folders[:] = [name for name, path in paths.items() if not os.path.islink(path)]
                for file in files:
                    if file.startswith("."):
                        skipped["hidden"] += 1
                    elif os.path.splitext(file)[1][1:].lower() not in EXTENSIONS:
                        skipped["without an image's extension"] += 1
                    else:
                        path = os.path.join(folder, file)
                        again += os.path.exists(path) and _seen(path, files_seen)
                        names.append(os.path.relpath(path, root))
    if again:
        print(f"'{root}': {again:,} images are reached by a second path too, and are kept twice", file=sys.stderr)
    return names


def _seen(path: str, seen: set[tuple[int, int]]) -> bool:
    """Whether a file or folder was seen by any path; adds it."""
    status = os.stat(path)
    identity = status.st_dev, status.st_ino
    known = identity in seen
    seen.add(identity)
    return known


def probe(path: Path) -> tuple[bool, int]:
    """(whether the file is an image, by its first bytes; its size in bytes). Raises UserError."""
    try:
        with open(path, "rb") as file:
            return sniff(file.read(SIGNATURE_BYTES)) is not None, os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"source file '{path}' cannot be read: {error.strerror}") from None
