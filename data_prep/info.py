"""Describes a data set from its manifest."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.imagenet import FULL_SIZE
from data_prep.labels import MAX_CLASSES
from data_prep.reports import SHOWN
from data_prep.torchvision_sets import SIZES
from mimscale.data.manifest import Ints, Manifest, ManifestFile
from mimscale.data.names import one_line
from mimscale.errors import UserError

EXAMPLES = 3


def describe_set(folder: Path, every_class: bool = False) -> list[str]:
    """Lines of text. every_class: with one line per class. Raises UserError."""
    manifest = Manifest.load(folder, check_shards=False)
    file = manifest.file
    total, image_bytes = sum(shard.bytes for shard in file.shards), int(manifest.sizes.sum())
    options = ", ".join(f"{name} {value}" for name, value in file.options.items() if value not in (None, False, 0))
    lines = [
        f"{manifest.samples:,} images in {len(file.shards):,} shards, {total / 2**30:,.2f} GiB; "
        f"an image has {image_bytes / manifest.samples / 1000:,.1f} kB on average",
        *known_size(manifest),
        *class_lines(manifest),
        f"from {file.source.get('kind', 'unknown')} {file.source.get('path', '')}".rstrip(),
        f"made with {options or 'default options'}",
        *(f"{count:,} images were {how}" for how, count in file.changed.items()),
        *_left_out(file),
        *([] if all(s.sha256 for s in file.shards) else ["the shards have no checksums"]),
        f"fingerprint {manifest.fingerprint}",
    ]
    sizes = class_sizes(manifest) if every_class else None
    if sizes is not None:
        lines += [f"{label} {_name(manifest, label)} {count:,}" for label, count in enumerate(sizes)]
    return lines


def figures_of_set(folder: Path, every_class: bool = False) -> dict[str, Any]:
    """The same as plain values. every_class: with the samples of each class, by its name. Raises UserError."""
    manifest = Manifest.load(folder, check_shards=False)
    file = manifest.file
    sizes = class_sizes(manifest)
    found: dict[str, Any] = {
        "folder": str(folder),
        "samples": manifest.samples,
        "shards": len(file.shards),
        "bytes": sum(shard.bytes for shard in file.shards),
        "image_bytes": int(manifest.sizes.sum()),
        "classes": None if sizes is None else len(sizes),
        "source": file.source,
        "options": file.options,
        "changed": file.changed,
        "skipped": file.skipped,
        "left_out": file.left_out,
        "bad_shards": file.bad_shards,
        "checksums": all(shard.sha256 for shard in file.shards),
        "fingerprint": manifest.fingerprint,
    }
    if every_class and sizes is not None:
        counts = [{"label": label, "name": _name(manifest, label), "samples": int(n)} for label, n in enumerate(sizes)]
        found["class_samples"] = counts
    return found


def _left_out(file: ManifestFile) -> list[str]:
    """What of the source is not in the set: by reason, with the first examples."""
    lines = []
    counts = file.skipped or Counter(file.left_out.values())
    if counts:
        lines.append(f"{sum(counts.values()):,} files or images of the source were left out:")
        lines += [f"  {count:,} {reason}" for reason, count in counts.items()]
        lines += [f"  for example {one_line(key)}: {reason}" for key, reason in list(file.left_out.items())[:EXAMPLES]]
    if file.bad_shards:
        lines.append(f"{len(file.bad_shards):,} bad shards were left out:")
        lines += [f"  {one_line(name)}: {reason}" for name, reason in list(file.bad_shards.items())[:SHOWN]]
    return lines


def known_size(manifest: Manifest) -> list[str]:
    """One line if the full size of the source is known, else none."""
    kind = manifest.file.source.get("kind")
    known = FULL_SIZE | SIZES
    if not isinstance(kind, str) or kind not in known:
        return []
    images, classes = known[kind]
    size = manifest.samples, len(manifest.classes or [])
    verdict = "all of it" if size == (images, classes) else "not all of it"
    return [f"{kind} has {images:,} images in {classes:,} classes: this is {verdict}"]


def class_sizes(manifest: Manifest) -> Ints | None:
    """int64 [classes]: number of samples of each class; None without labels. Raises UserError."""
    if manifest.labels is None:
        return None
    known = len(manifest.classes) if manifest.classes is not None else int(manifest.labels.max()) + 1
    if manifest.classes is None and known > MAX_CLASSES:  # a damaged file: a list of that many would fill the memory
        raise UserError(f"'{manifest.location}': label {known - 1:,} is no class; repeat its `python -m data_prep`")
    return np.bincount(manifest.labels[(manifest.labels >= 0) & (manifest.labels < known)], minlength=known)


def class_lines(manifest: Manifest) -> list[str]:
    """One line with the numbers of samples per class."""
    sizes = class_sizes(manifest)
    if sizes is None:
        return ["no labels"]
    least, most = int(sizes.argmin()), int(sizes.argmax())
    empty = f"; {int((sizes == 0).sum()):,} are empty" if (sizes == 0).any() else ""
    return [
        f"{len(sizes):,} classes of {sizes.min():,} ({_name(manifest, least)}) to {sizes.max():,} "
        f"({_name(manifest, most)}) samples (median {int(np.median(sizes)):,}){empty}"
    ]


def _name(manifest: Manifest, label: int) -> str:
    return manifest.classes[label] if manifest.classes is not None else f"class {label}"
