"""What the protocols share that train many heads at once on cached features, and choose one on held-out images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mimscale.evals.metrics import mean_per_class, top1
from mimscale.evals.parallel import all_sum
from mimscale.evals.protocols.base import Context, Features, Results
from mimscale.evals.protocols.linear import hold_out

HELD_OUT_IMAGES = 5_000
"""So many training images are held out, but at least 1 % and at most 10 % of them."""
DIVERGED = -1
CHUNK = 2_048  # samples that are classified at a time
Rate = Annotated[float, Field(gt=0, lt=1e9)]


@dataclass(frozen=True)
class Split:
    """Rows of the training set, int64: those that heads learn from, and those that choose among the heads."""

    inside: Tensor
    outside: Tensor


def split(labels_N: Tensor, seed: int) -> Split:
    """The same share of each class is held out."""
    share = min(0.1, max(0.01, HELD_OUT_IMAGES / len(labels_N)))
    held = torch.from_numpy(hold_out(labels_N.numpy(), share, seed))
    return Split((~held).nonzero().flatten(), held.nonzero().flatten())


def batch_of(asked: int, samples: int) -> int:
    """Images per step: as asked, or a quarter of a training set that is small."""
    return max(2, min(asked, samples // 4))  # BatchNorm needs two


def batches(rows: Tensor, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` times `batch` of these rows, each pass over them in another order; what is left at its end is left out.

    The same on every rank.
    """
    random = np.random.default_rng([seed, 2])
    order, place = torch.empty(0, dtype=torch.int64), 0
    for _ in range(steps):
        if place + batch > len(order):
            order, place = rows[torch.from_numpy(random.permutation(len(rows)))], 0
        yield order[place : place + batch]
        place += batch


def half_cosine(step: int, steps: int, warmup: float = 0.0) -> float:
    """Factor of the learning rate of `step`, from 0: linear from 0 over the warm-up, then half a cosine to 0."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def rows_on(device: torch.device, data: Features, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(values, labels) of these rows, on the device."""
    return data.values[rows].to(device, torch.float32), data.labels[rows].to(device)


def scores(
    logits: Callable[[Tensor], Tensor],
    train: Features,
    outside: Tensor,
    val: Features,
    mine: Sequence[int],
    heads: int,
    context: Context,
) -> list[dict[str, float]]:
    """Of each of all heads: percent of the held-out images and of val that it gets right, and on val per class.

    0 for a head that has diverged: of outputs that are not finite the largest would be that of the first class.
    logits: values -> [B, H, classes] of this rank's heads, whose numbers are `mine`. outside: rows of the training set.
    Collective.
    """
    everywhere = torch.arange(len(val.labels))
    on_val, truth = _predicted(logits, val, everywhere, context), val.labels
    percent = {
        "held_out": _percent(top1, _predicted(logits, train, outside, context), train.labels[outside], context),
        "val": _percent(top1, on_val, truth, context),
        "val_per_class": _percent(mean_per_class, on_val, truth, context),
    }
    found = {key: _gathered(mine, values, heads) for key, values in percent.items()}
    return [{key: values[number] for key, values in found.items()} for number in range(heads)]


@torch.no_grad()
def _predicted(logits: Callable[[Tensor], Tensor], data: Features, rows: Tensor, context: Context) -> Tensor:
    """int64 [N, H] in host memory; DIVERGED where an output is not finite."""
    found = []
    for some in rows.split(CHUNK):
        values, _ = rows_on(context.device, data, some)
        outputs = logits(values)
        found.append(outputs.argmax(dim=-1).where(outputs.isfinite().all(dim=-1), DIVERGED).cpu())
    return torch.cat(found)


def _percent(
    measure: Callable[[Tensor, Tensor, int], float], predicted_NH: Tensor, truth_N: Tensor, context: Context
) -> Tensor:
    """float64 [H]."""
    found = [
        0.0 if (of_head == DIVERGED).any() else measure(of_head, truth_N, context.classes) for of_head in predicted_NH.T
    ]
    return torch.tensor(found, dtype=torch.float64)


def _gathered(mine: Sequence[int], values: Tensor, heads: int) -> list[float]:
    """The values of all heads out of those that each rank has. mine: numbers of this rank's heads. Collective."""
    whole = torch.zeros(heads, dtype=torch.float64)
    whole[list(mine)] = values
    return [float(value) for value in all_sum(whole)]


def choice(name: str, heads: Sequence[dict[str, Any]], key: str, grid: Sequence[float]) -> Results:
    """The head that is best on the held-out images, its accuracy on val, and beside it the best on val.

    heads: settings, and what `scores` gives. key: the setting that is a grid, for a warning where the
    chosen head has its first or last value. The first of equals is taken.
    """
    chosen, on_val = (max(heads, key=lambda head: head[by]) for by in ("held_out", "val"))
    warnings = []
    if not any(head["held_out"] for head in heads):
        warnings.append("no head gets a held-out image right: with lower --rates the heads may not diverge")
    elif len({*grid}) > 1 and chosen[key] in (min(grid), max(grid)):
        end = "smallest" if chosen[key] == min(grid) else "largest"
        warnings.append(f"{key} = {chosen[key]:g} was chosen, the {end} of the grid; another may be better")
    return {
        name: chosen["val"],
        f"{name}_per_class": chosen["val_per_class"],
        f"{name}_val_chosen": on_val["val"],
        "chosen": chosen,
        "val_chosen": on_val,
        "heads": list(heads),
        "warnings": warnings,
    }
