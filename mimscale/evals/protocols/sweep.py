"""Many linear heads trained at once, one of which is chosen on held-out training images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mimscale.config.base import Strict
from mimscale.data.manifest import Manifest
from mimscale.evals import sgd_heads
from mimscale.evals.protocols.base import Context, Features, Protocol, Results

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
BLOCKS = (1, 4)
STD = 0.01  # of the weights at the start
LEAST_STEPS = 1_250
MOMENTUM = 0.9
EPS = 1e-6  # of BatchNorm
Pool = Literal["cls", "cls+mean", "mean"]


class SweepConfig(Strict):
    epochs: float = Field(10, gt=0, le=1000, description="passes over the training set, at least 1,250 steps")
    steps: int | None = Field(None, ge=1, description="optimiser steps in place of epochs")
    global_batch: int = Field(1024, ge=2, description="images per step, at most a quarter of the training set")
    rates: tuple[sgd_heads.Rate, ...] = Field(RATES, min_length=1, description="learning rates per 256 images")

    @model_validator(mode="after")
    def _one_length(self) -> SweepConfig:
        if self.steps is not None and "epochs" in self.model_fields_set:
            raise ValueError(f"--steps {self.steps} stands in place of --epochs {self.epochs:g}; give one of them")
        return self


class Input(NamedTuple):
    """What a head sees: class tokens of the last `blocks` blocks, and with cls+mean the last block's patch mean; the
    patch means where there is no class token. norm: BatchNorm without parameters before the layer.
    """

    blocks: int
    pool: Pool
    norm: bool

    def of(self, values_BLSD: Tensor) -> Tensor:
        """[B, L, 2, D], or [B, L, 1, D] without a class token -> [B, blocks * D (+ D)]."""
        first = values_BLSD[:, -self.blocks :, 0].flatten(1)
        return torch.cat([first, values_BLSD[:, -1, 1]], dim=1) if self.pool == "cls+mean" else first


class Head(NamedTuple):
    """number: in the whole sweep. rate: per 256 images."""

    number: int
    input: Input
    rate: float


class Sweep(Protocol):
    """DINOv2's grid of linear heads (learning rate, blocks, pooling) and BatchNorm, chosen on held-out training images

    Source: DINOv2 (Oquab et al. 2024, arXiv 2304.07193; its eval/linear.py): 13 learning rates x {1, 4} last blocks x
    {class token, class token + patch mean}, SGD with momentum 0.9, no weight decay, cosine to 0, 12,500 steps of 1,024
    images, weights N(0, 0.01). Differences: features of one centre crop per image, where the release draws a crop each
    time; BatchNorm as a further axis, because features of masked image modeling are scaled badly; and the head is
    chosen on training images that were held out. The release chooses on the validation set itself: that figure stands
    beside ours, named so, and is too high by what the choice gains.
    """

    Config = SweepConfig
    needs: ClassVar = frozenset({"blocks", "labels"})
    blocks: ClassVar = max(BLOCKS)
    metrics: ClassVar = {"sweep": "linear sweep", "sweep_val_chosen": "chosen on val"}
    constants: ClassVar = {"momentum": MOMENTUM, "weight_decay": 0.0, "schedule": "cosine to 0", "crop": "centre"}
    departs: ClassVar = (
        "one centre crop per image, where DINOv2's release draws a random crop and flip each time; the head is chosen "
        "on held-out training images, where the release chooses on val; BatchNorm is a further axis of the grid",
    )

    def __init__(self, config: SweepConfig, context: Context) -> None:
        super().__init__(config, context)
        self.config: SweepConfig = config

    @classmethod
    def check(cls, config: SweepConfig, train: Manifest, val: Manifest) -> None:
        assert train.labels is not None
        sgd_heads.split(torch.tensor(train.labels), seed=0)

    def run(self, train: Features, val: Features) -> Results:
        """Ranks share the heads: each sees the same batches wherever it is trained."""
        c = self.context
        parts = sgd_heads.split(train.labels, c.seed)
        batch = sgd_heads.batch_of(self.config.global_batch, len(parts.inside))
        steps = self.config.steps or max(LEAST_STEPS, round(self.config.epochs * len(parts.inside) / batch))
        heads = all_heads(train.values.shape, self.config.rates)
        mine = share_of(heads, c.rank, c.world)
        trained = TrainedTogether(mine, train.values.shape[-1], c)
        fit(trained, train, parts.inside, batch, steps)
        numbers = [head.number for head in mine]
        scores = sgd_heads.scores(trained.logits, train, parts.outside, val, numbers, len(heads), c)
        rows: list[dict[str, Any]] = [
            {**head.input._asdict(), "rate": head.rate, **of} for head, of in zip(heads, scores, strict=True)
        ]
        result = sgd_heads.choice("sweep", rows, "rate", self.config.rates)
        return {**result, "steps": steps, "batch": batch, "held_out_images": len(parts.outside)}


def all_heads(shape: Sequence[int], rates: Sequence[float]) -> list[Head]:
    """Every head that features [N, L, S, D] allow; heads of one input follow each other."""
    _, depth, summaries, _ = shape
    pools: tuple[Pool, ...] = ("cls", "cls+mean") if summaries > 1 else ("mean",)
    blocks = dict.fromkeys(min(blocks, depth) for blocks in BLOCKS)
    inputs = [Input(*of) for of in ((b, p, norm) for b in blocks for p in pools for norm in (False, True))]
    return [Head(n, i, rate) for n, (i, rate) in enumerate((i, rate) for i in inputs for rate in rates)]


def share_of(heads: Sequence[Head], rank: int, world: int) -> list[Head]:
    """The heads that a rank trains: all of an input, so that their matrix product, and each number, is the same for any
    number of ranks. The widest inputs are given out first, each to the rank that has the least.
    """
    load, mine = [0] * world, list[Head]()
    widest_first = sorted(_by_input(heads), key=lambda group: -_width(group[0]))
    for of, group in widest_first:
        owner = load.index(min(load))
        load[owner] += _width(of)
        mine += group if owner == rank else []
    return sorted(mine, key=lambda head: head.number)


class TrainedTogether(nn.Module):
    """Some heads of a sweep; those of one input are one matrix product.

    A head's learning rate is a factor of its loss: for SGD without weight decay it is the same.
    """

    def __init__(self, heads: Sequence[Head], width: int, context: Context) -> None:
        super().__init__()
        self.context, self.rates = context, [[head.rate for head in group] for _, group in _by_input(heads)]
        self.inputs = [of for of, _ in _by_input(heads)]
        self.norms, self.weights, self.biases = nn.ModuleList(), nn.ParameterList(), nn.ParameterList()
        for of, group in _by_input(heads):
            features = width * _width(of)
            self.norms.append(nn.BatchNorm1d(features, eps=EPS, affine=False) if of.norm else nn.Identity())
            drawn = [_weights(features, context.classes, context.seed, head.number) for head in group]
            self.weights.append(nn.Parameter(torch.stack(drawn, dim=1)))
            self.biases.append(nn.Parameter(torch.zeros(len(group), context.classes)))
        self.to(context.device)

    def group_logits(self, values_BLSD: Tensor, group: int) -> Tensor:
        """[B, heads of this input, classes]."""
        weight_FHC = self.weights[group]
        x = self.norms[group](self.inputs[group].of(values_BLSD))
        return (x @ weight_FHC.flatten(1)).view(len(x), *weight_FHC.shape[1:]) + self.biases[group]

    def logits(self, values_BLSD: Tensor) -> Tensor:
        """[B, H, classes], heads in the order given."""
        found = [self.group_logits(values_BLSD, group) for group in range(len(self.inputs))]
        return torch.cat(found, dim=1) if found else values_BLSD.new_zeros(len(values_BLSD), 0, 1)

    def add_gradients(self, values_BLSD: Tensor, labels_B: Tensor, scale: float) -> None:
        """Of one batch. scale: of the rates, for the batch's size."""
        for group, rates in enumerate(self.rates):  # one at a time: their logits need not be kept together
            logits = self.group_logits(values_BLSD, group)
            losses = F.cross_entropy(logits.transpose(1, 2), labels_B[:, None].expand(-1, len(rates)), reduction="none")
            (losses.mean(dim=0) @ logits.new_tensor(rates) * scale).backward()


def fit(heads: TrainedTogether, train: Features, rows: Tensor, batch: int, steps: int) -> None:
    """SGD over the rows of the training set, then evaluation mode. A rank without heads does nothing."""
    if heads.inputs:
        optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=MOMENTUM)
        for step, some in enumerate(sgd_heads.batches(rows, batch, steps, heads.context.seed)):
            optimizer.param_groups[0]["lr"] = sgd_heads.half_cosine(step, steps)
            optimizer.zero_grad()
            heads.add_gradients(*sgd_heads.rows_on(heads.context.device, train, some), batch / 256)
            optimizer.step()
    heads.eval()


def _width(of: Input) -> int:
    """Of an input, in widths of the network."""
    return of.blocks + (of.pool == "cls+mean")


def _by_input(heads: Sequence[Head]) -> list[tuple[Input, list[Head]]]:
    return [(of, list(group)) for of, group in groupby(heads, key=lambda head: head.input)]


def _weights(features: int, classes: int, seed: int, number: int) -> Tensor:
    """The start of one head: it does not depend on which rank trains it."""
    random = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return torch.randn(features, classes, generator=random) * STD
