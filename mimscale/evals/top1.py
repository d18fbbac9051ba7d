"""Accuracy of a classifier: top-1 and top-5, over the ranks of a run or of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from mimscale.errors import UserError
from mimscale.types import Batch

Logits = Callable[[Tensor], Tensor]
"""Normalised images, float32 [B, 3, H, W] -> [B, classes]."""
BEST = 5


class Accuracy(NamedTuple):
    """samples: how many were counted. top1, top5: percent; top5 of fewer than five classes is of all of them."""

    samples: int
    top1: float
    top5: float


@torch.no_grad()
def count(logits: Logits, batches: Iterable[Batch], device: torch.device) -> Tensor:
    """int64 [4] on the device, of this rank's batches: samples, right at first, right among BEST, not finite.

    batches: out of `data.loader.eval_batches`, with labels; rows of weight 0 are left out. Draws no random numbers and
    waits for the device in no batch.
    """
    found = torch.zeros(4, dtype=torch.int64, device=device)
    for batch in batches:
        assert batch.labels is not None and batch.weights is not None
        batch = batch.to(device).normalised()
        outputs, labels, real = logits(batch.images), batch.labels, batch.weights > 0
        best = outputs.topk(min(BEST, outputs.shape[1]), dim=1).indices == labels[:, None]
        finite = outputs.isfinite().all(dim=1)
        columns = (torch.ones_like(real), best[:, 0], best.any(dim=1), ~finite)
        found += torch.stack([(column & real).sum() for column in columns])
    return found


def accuracy(counts: Tensor) -> Accuracy:
    """Of the sum of the counts over all ranks. Raises UserError where an output is not finite."""
    samples, first, among, broken = counts.tolist()
    if broken:
        raise UserError(
            f"the classifier's outputs are inf or NaN for {broken} of {samples} images; take a checkpoint from before "
            f"the run diverged"
        )
    return Accuracy(samples, *(round(100 * right / max(1, samples), 4) for right in (first, among)))
