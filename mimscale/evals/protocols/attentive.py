"""A learned pooling of the patch tokens and a linear layer, trained for some learning rates at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mimscale.config.base import Strict
from mimscale.data.manifest import Manifest
from mimscale.errors import UserError
from mimscale.evals import sgd_heads
from mimscale.evals.protocols.base import Context, Features, Protocol, Results
from mimscale.models.attentive_pool import Kind, attentive_pool
from mimscale.optim.optimizers.lars import WholeParameterLars

RATES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
LEAST_STEPS = 1_250  # of a small training set, which LARS would hardly move in 90 passes
MOMENTUM, TRUST = 0.9, 1e-3
EPS = 1e-6  # of BatchNorm
MOST = {"efficient": 32, "latent": 8}  # queries, heads


class AttentiveConfig(Strict):
    head: Kind = Field("efficient", description="multi-query efficient probe, or timm's AttentionPoolLatent")
    queries: int | None = Field(None, ge=1, description="queries (efficient, default 32) or heads (latent, default 8)")
    epochs: float = Field(90, gt=0, le=1000, description="passes over the training set, at least 1,250 steps")
    steps: int | None = Field(None, ge=1, description="optimiser steps in place of epochs")
    warmup_epochs: float = Field(10, ge=0, le=1000, description="of them with a rising rate, at most a ninth")
    global_batch: int = Field(4096, ge=2, description="images per step, at most a quarter of the training set")
    rates: tuple[sgd_heads.Rate, ...] = Field(RATES, min_length=1, description="learning rates per 256 images")

    @model_validator(mode="after")
    def _one_length(self) -> AttentiveConfig:
        if self.steps is not None and "epochs" in self.model_fields_set:
            raise ValueError(f"--steps {self.steps} stands in place of --epochs {self.epochs:g}; give one of them")
        return self


class Attentive(Protocol):
    """attentive probe: learned pooling of the patch tokens, BatchNorm, linear layer; rate chosen on held-out images

    Source: Psomas et al., ICLR 2026 (arXiv 2506.10178) and its code: 32 queries, BatchNorm without parameters, LARS
    with base rate 0.1, batch 4096, 90 epochs, warm-up 10, cosine to 0. `latent` is timm's AttentionPoolLatent with an
    MLP of ratio 4, trained alike. Differences: features of one centre crop per image, where the release draws a crop
    each time; the learning rate is chosen from a grid on training images that were held out, and the accuracy is that
    of the last epoch. The release reports the best epoch on the validation set; `val chosen` is the best rate there.
    """

    Config = AttentiveConfig
    needs: ClassVar = frozenset({"tokens", "labels"})
    metrics: ClassVar = {"attentive": "attentive, {head}", "attentive_val_chosen": "chosen on val"}
    constants: ClassVar = {"optimizer": "lars", "momentum": MOMENTUM, "trust_coefficient": TRUST, "crop": "centre"}
    departs: ClassVar = (
        "one centre crop per image, where the release of efficient probing draws a random crop each time; the rate is "
        "chosen on held-out training images and the last epoch counts, where the release reports the best epoch on val",
    )

    def __init__(self, config: AttentiveConfig, context: Context) -> None:
        super().__init__(config, context)
        self.config: AttentiveConfig = config

    @classmethod
    def check(cls, config: AttentiveConfig, train: Manifest, val: Manifest) -> None:
        assert train.labels is not None
        sgd_heads.split(torch.tensor(train.labels), seed=0)

    def run(self, train: Features, val: Features) -> Results:
        """Rank r trains the rates r, r + world, ...: each sees the same batches wherever it is trained."""
        c, config = self.context, self.config
        parts = sgd_heads.split(train.labels, c.seed)
        batch = sgd_heads.batch_of(config.global_batch, len(parts.inside))
        steps = config.steps or max(LEAST_STEPS, round(config.epochs * len(parts.inside) / batch))
        warmup = steps * min(config.warmup_epochs / config.epochs, 1 / 9)
        numbers = list(range(len(config.rates)))[c.rank :: c.world]
        width, most = train.values.shape[-1], config.queries or MOST[config.head]
        if config.queries is not None and width % config.queries:
            raise UserError(f"--queries {config.queries} does not divide the features' width {width}")
        heads = [make_head(config.head, width, most, c) for _ in numbers]
        fit(heads, [config.rates[n] for n in numbers], train, parts.inside, batch, steps, warmup, c)

        def logits(values: Tensor) -> Tensor:
            found = [head(values) for head in heads]
            return torch.stack(found, dim=1) if found else values.new_zeros(len(values), 0, 1)

        scores = sgd_heads.scores(logits, train, parts.outside, val, numbers, len(config.rates), c)
        rows: list[dict[str, Any]] = [{"rate": rate, **of} for rate, of in zip(config.rates, scores, strict=True)]
        result = sgd_heads.choice("attentive", rows, "rate", config.rates)
        return {
            **result,
            "queries": attentive_pool(config.head, width, most)[1],
            "parameters": sum(p.numel() for p in make_head(config.head, width, most, c).parameters()),
            "steps": steps,
            "batch": batch,
            "held_out_images": len(parts.outside),
        }


def make_head(kind: Kind, width: int, most: int, context: Context) -> nn.Module:
    """Pooling, BatchNorm without parameters, linear layer; the same start each time, from generators of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(context.seed)
        pool, _ = attentive_pool(kind, width, most)
        head = nn.Sequential(pool, nn.BatchNorm1d(width, eps=EPS, affine=False), nn.Linear(width, context.classes))
    return head.to(context.device)


def fit(
    heads: Sequence[nn.Module],
    rates: Sequence[float],
    train: Features,
    rows: Tensor,
    batch: int,
    steps: int,
    warmup: float,
    context: Context,
) -> None:
    """LARS over the rows of the training set, each head at its own rate, then evaluation mode. warmup: in steps."""
    optimizers = [WholeParameterLars(head.parameters(), 0.0, MOMENTUM, TRUST) for head in heads]
    if heads:
        for step, some in enumerate(sgd_heads.batches(rows, batch, steps, context.seed)):
            values, labels = sgd_heads.rows_on(context.device, train, some)
            for head, optimizer, rate in zip(heads, optimizers, rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * batch / 256 * sgd_heads.half_cosine(step, steps, warmup)
                optimizer.zero_grad()
                F.cross_entropy(head(values), labels).backward()
                optimizer.step()
    for head in heads:
        head.eval()
