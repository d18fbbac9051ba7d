"""What a data set is, from its manifest alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.imagenet import FULL
from mimscale.data.manifest import Ints, Manifest


def describe_set(folder: Path, every_class: bool = False) -> list[str]:
    """Lines for a reader. every_class: also one per class. Raises UserError."""
    manifest = Manifest.load(folder, check_shards=False)
    file = manifest.file
    total, pictures = sum(shard.bytes for shard in file.shards), int(manifest.sizes.sum())
    asked = ", ".join(f"{name} {value}" for name, value in file.options.items() if value not in (None, False, 0))
    lines = [
        f"{manifest.samples:,} pictures in {len(file.shards):,} shards, {total / 2**30:,.2f} GiB; "
        f"a picture has {pictures / manifest.samples / 1000:,.1f} kB on average",
        *known_size(manifest),
        *class_lines(manifest),
        f"from {file.source.get('kind', 'unknown')} {file.source.get('path', '')}".rstrip(),
        f"made with {asked or 'default options'}",
        *(f"{count:,} pictures were {how}" for how, count in file.changed.items()),
        *([f"{len(file.left_out):,} pictures of the source were left out"] if file.left_out else []),
        *([] if all(s.sha256 for s in file.shards) else ["the shards have no checksums"]),
        f"fingerprint {manifest.fingerprint}",
    ]
    sizes = class_sizes(manifest) if every_class else None
    if sizes is not None:
        lines += [f"{label} {_name(manifest, label)} {count:,}" for label, count in enumerate(sizes)]
    return lines


def known_size(manifest: Manifest) -> list[str]:
    """One line where the source's full size is known."""
    kind = manifest.file.source.get("kind")
    if kind not in FULL:
        return []
    pictures, classes = FULL[kind]
    here = manifest.samples, len(manifest.classes or [])
    verdict = "all of it" if here == (pictures, classes) else "not all of it"
    return [f"{kind} has {pictures:,} pictures in {classes:,} classes: this is {verdict}"]


def class_sizes(manifest: Manifest) -> Ints | None:
    """int64 [classes]: samples of each; None without labels."""
    if manifest.labels is None:
        return None
    known = len(manifest.classes) if manifest.classes is not None else int(manifest.labels.max()) + 1
    return np.bincount(manifest.labels[(manifest.labels >= 0) & (manifest.labels < known)], minlength=known)


def class_lines(manifest: Manifest) -> list[str]:
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
