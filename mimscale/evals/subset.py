"""A fixed subset of a data set, chosen by position, whose images are read once and kept in host memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mimscale.data.datasets import EvalDataset
from mimscale.data.manifest import Ints, Manifest
from mimscale.evals.parallel import rows_of

READ_AT_A_TIME = 16


@dataclass(frozen=True)
class Subset:
    """manifest: the whole data set. ids: int64 [n], ascending, the samples of the subset."""

    manifest: Manifest
    ids: Ints

    @property
    def labels(self) -> Tensor:
        """int64 [n], -1 where the data set has none."""
        of_all = self.manifest.labels
        return torch.full((len(self.ids),), -1) if of_all is None else torch.from_numpy(np.array(of_all[self.ids]))

    def as_manifest(self) -> Manifest:
        """For what asks how many samples of which labels there are. Its images cannot be read."""
        whole, labels = self.manifest, self.manifest.labels
        file = whole.file.model_copy(update={"samples": len(self.ids)})
        return Manifest(
            whole.folder, file, whole.index[self.ids], None if labels is None else labels[self.ids], whole.location
        )


def evenly_spread(manifest: Manifest, most: int) -> Subset:
    """`most` samples, or all where there are fewer: number i is the sample at i/most of the data set.

    So every class is met also where shards lie in the order of classes. Index and labels are copied out of their mapped
    files, because reading a mapped file that was cut meanwhile ends the process.
    """
    count = min(most, manifest.samples)
    ids = np.arange(count, dtype=np.int64) * manifest.samples // count
    labels = None if manifest.labels is None else np.array(manifest.labels)
    loaded = Manifest(
        manifest.folder, manifest.file, np.array(manifest.index), labels, manifest.location, manifest.cache
    )
    return Subset(loaded, ids)


def part_of(subset: Subset, rank: int, world: int) -> Subset:
    """The rank's part of the samples, see `parallel.rows_of`."""
    return replace(subset, ids=subset.ids[rows_of(len(subset.ids), rank, world)])


def read_images(subset: Subset, image_size: int, crop_pct: float, threads: int) -> Tensor:
    """uint8 [n, 3, H, W] in host memory: centre crops without anything random, see `data.transforms.center_crop`.

    By threads, so that no process is forked in the middle of a run. Raises DamagedSample, a Stopped, for an image that
    cannot be read.
    """
    if not len(subset.ids):
        return torch.empty(0, 3, image_size, image_size, dtype=torch.uint8)
    dataset = EvalDataset(subset.manifest, image_size, crop_pct)
    pieces = np.array_split(subset.ids, -(-len(subset.ids) // READ_AT_A_TIME))

    def read(ids: Ints) -> Tensor:
        (batch,) = dataset[ids, np.ones(len(ids), np.float32)]
        return batch.images

    with ThreadPoolExecutor(max(1, threads)) as pool:
        try:
            return torch.cat(list(pool.map(read, pieces)))
        finally:
            pool.shutdown(cancel_futures=True)
            subset.manifest.close()
