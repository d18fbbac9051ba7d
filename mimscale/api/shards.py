"""`mimscale.open_shards`: the samples of a data set in order, each exactly once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from mimscale.api import arguments
from mimscale.api.images import CROP_PCT
from mimscale.data.loader import eval_batches
from mimscale.data.manifest import Manifest
from mimscale.data.shard_cache import Cache
from mimscale.data.storage import is_remote
from mimscale.errors import UserError

MOST_WORKERS = 8


@dataclass(frozen=True)
class ShardBatch:
    """Consecutive samples of a data set.

    images: uint8 [B, 3, image_size, image_size], RGB.  labels: int64 [B], -1 for a sample without one; None for a data
    set without labels, or where they were not wanted.  ids: int64 [B], row of each sample in the manifest.
    """

    images: Tensor
    labels: Tensor | None
    ids: Tensor
    _manifest: Manifest = field(repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def keys(self) -> list[str]:
        """[B] names of the samples inside their shards, without extension. Reads each from its shard: OSError."""
        return [self._manifest.key(sample) for sample in self.ids.tolist()]


class Shards:
    """A data set of tar shards; made by `mimscale.open_shards`. `len` is its number of samples.

    classes: names in label order; None where there are none.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self.classes: tuple[str, ...] | None = None if manifest.classes is None else tuple(manifest.classes)

    def __len__(self) -> int:
        return self._manifest.samples

    def __repr__(self) -> str:
        classes = "no classes" if self.classes is None else f"{len(self.classes)} classes"
        return f"Shards({self._manifest.location!r}, {len(self):,} samples, {classes})"

    def batches(
        self,
        size: int,
        *,
        image_size: int = 224,
        crop_pct: float = CROP_PCT,
        workers: int | None = None,
        labels: bool | None = None,
    ) -> Iterator[ShardBatch]:
        """Every sample exactly once, in the order of the manifest; `size` at a time, the last batch what is left.

        Images are cropped as `mimscale evaluate` does it: the short side becomes image_size / crop_pct pixels
        (bicubic), then the centre is cut out. workers: processes that read and decode, 0 = this one; None: one for each
        CPU that this process may use, 8 at most. They end with the iterator. labels: True insists on them, False leaves
        them out; None: where there are any.

        Raises UserError, also for labels that are missing; and mimscale.Stopped, whose text names shard and key, for a
        sample that cannot be read: nothing is left out or replaced.

        >>> import mimscale
        >>> shards = mimscale.open_shards("runs/tiny/shards")
        >>> [len(batch) for batch in shards.batches(300, image_size=48)]
        [300, 300, 300, 100]
        """
        size = arguments.whole_number("size", size, 1, 2**31)
        image_size = arguments.whole_number("image_size", image_size, 1, arguments.LARGEST_IMAGE)
        if workers is not None:
            workers = arguments.whole_number("workers", workers, 0, 1024)
        crop_pct = 1.0 if crop_pct == 1 else arguments.fraction("crop_pct", crop_pct, "0.875 is usual, 1 the whole")
        if labels is not None:
            labels = arguments.flag("labels", labels)
        stored = self._manifest.labels
        if labels and (stored is None or stored.min() < 0):
            raise UserError(
                f"{self._manifest.location} has samples without labels; leave labels out, or set it to False"
            )
        if workers is None:
            workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
        batches = eval_batches(self._manifest, image_size, batch=size, workers=workers, crop_pct=crop_pct)
        return self._without_padding(batches, labels is not False)

    def _without_padding(self, batches: Iterator, with_labels: bool) -> Iterator[ShardBatch]:
        with closing(batches):  # type: ignore[type-var]
            for batch in batches:
                real = int(batch.weights.sum())  # what fills the last batch up has weight 0 and stands at its end
                batch = batch.first(real)
                yield ShardBatch(batch.images, batch.labels if with_labels else None, batch.ids, self._manifest)


def open_shards(path: str | Path, *, cache: str | Path | None = None, cache_gib: float = 200.0) -> Shards:
    """A data set that `python -m data_prep` wrote or indexed, to iterate over.

    path: the folder that holds manifest.json, or its address: http(s)://, s3:// or gs://.
    cache: a folder on this machine's own disk, which an address needs, for index, labels and shards that a training run
        has fetched; other samples are read from where they lie. cache_gib: its limit.

    Raises mimscale.UserError where the data set is missing, incomplete or damaged; a stream without an index (wds:) is
    for training only.

    >>> import mimscale
    >>> shards = mimscale.open_shards("runs/tiny/shards")
    >>> len(shards), shards.classes[:2]
    (1000, ('class_000', 'class_001'))
    >>> batch = next(shards.batches(32, image_size=48))
    >>> batch.images.shape, batch.images.dtype
    (torch.Size([32, 3, 48, 48]), torch.uint8)
    >>> batch.ids[:3].tolist(), len(batch.labels), len(batch.keys)
    ([0, 1, 2], 32, 32)
    """
    arguments.path("path", path)
    if is_remote(path) and cache is None:
        raise UserError(f"{path} is remote: give cache=, a folder on this machine's own disk")
    if isinstance(cache_gib, bool) or not isinstance(cache_gib, int | float) or not 0 < cache_gib <= 1e9:
        raise UserError(f"cache_gib = {cache_gib!r} must be a number above 0 and at most 1e9")
    try:
        place = None if cache is None else arguments.path("cache", cache)
        opened = None if place is None else Cache(place, int(cache_gib * 2**30))
    except OSError as error:
        raise UserError(f"cache = {cache} cannot be made: {error.strerror}") from None
    return Shards(Manifest.load(path, cache=opened))
