"""Shards of `mimscale bench methods`: a balanced part of Fashion-MNIST."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path

from data_prep.fashion import read_fashion
from data_prep.plan import Item, ShardPlan, Source
from data_prep.write_shards import unfinished, write
from mimscale.bench._methods_rows import CLASSES, Preset
from mimscale.errors import UserError


def prepare(folder: Path, source: Path, preset: Preset) -> None:
    """Write folder/data/train and folder/data/val unless they are there. Raises UserError."""
    for split, count in (("train", preset.images), ("val", preset.test)):
        whole = read_fashion(source, split)
        plan = ShardPlan(balanced(whole, count), seed=0, shard_samples=2000)
        target = folder / "data" / split
        with redirect_stderr(StringIO()):
            write(plan, target, unfinished(plan, target))


def balanced(source: Source, count: int) -> Source:
    """The first images of each class, equally many. Raises UserError where there are too few."""
    each = count // CLASSES
    taken: Counter[int] = Counter()
    kept: list[Item] = []
    for item in source.items:
        if taken[item.label] < each:
            taken[item.label] += 1
            kept.append(item)
    short = [label for label in range(CLASSES) if taken[label] < each]
    if short:
        raise UserError(
            f"class {short[0]} of '{source.description['path']}' has {taken[short[0]]:,} images and the preset takes "
            f"{each:,} of each; choose a smaller preset"
        )
    return replace(source, items=kept)


def find_source(given: Path | None, places: Sequence[Path]) -> Path:
    """The folder of Fashion-MNIST. Raises UserError with the ways to get it."""
    for place in [given] if given is not None else places:
        if place.is_dir():
            return place
    raise UserError(
        f"no Fashion-MNIST at {given or ' or '.join(map(str, places))}; apt-get install dataset-fashion-mnist, or name "
        "torchvision's download folder with --data"
    )
