"""Accuracy of a classifier: top-1 and top-5, over the ranks of a run or of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mimscale.errors import UserError
from mimscale.types import Batch, normalised

Logits = Callable[[Tensor], Tensor]
"""Normalised images, float32 [B, 3, H, W] -> [B, classes]."""
BEST = 5


class Accuracy(NamedTuple):
    """samples: how many were counted. top1, top5: percent; top5 of fewer than five classes is of all of them."""

    samples: int
    top1: float
    top5: float


@torch.no_grad()
def count(logits: Logits, pieces: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> Tensor:
    """int64 [4] on the device, of this rank's images: samples, right at first, right among BEST, not finite.

    pieces: uint8 [B, 3, H, W] and int64 labels [B]; B may be 0. Draws no random numbers.
    """
    found = torch.zeros(4, dtype=torch.int64, device=device)
    for images, labels in pieces:
        if not len(labels):
            continue
        outputs, labels = logits(normalised(images.to(device))), labels.to(device)
        best = outputs.topk(min(BEST, outputs.shape[1]), dim=1).indices == labels[:, None]
        broken = ~outputs.isfinite().all(dim=1)
        columns = (torch.ones_like(broken), best[:, 0], best.any(dim=1), broken)
        found += torch.stack([column.sum() for column in columns])
    return found


def labelled(batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """For `count`: the images and labels of `data.loader.eval_batches`, without what fills batches up."""
    for batch in batches:
        assert batch.labels is not None and batch.weights is not None
        real = int(batch.weights.sum())  # the others stand at the end
        yield batch.images[:real], batch.labels[:real]


def accuracy(counts: Tensor) -> Accuracy:
    """Of the sum of the counts over all ranks. Raises UserError where an output is not finite."""
    samples, first, among, broken = counts.tolist()
    if broken:
        raise UserError(
            f"the classifier's outputs are inf or NaN for {broken} of {samples} images; take a checkpoint from before "
            f"the run diverged"
        )
    return Accuracy(samples, *(round(100 * right / max(1, samples), 4) for right in (first, among)))
