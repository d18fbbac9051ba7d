"""Weighted k-nearest-neighbour classification."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mimscale.config.base import Strict
from mimscale.data.manifest import Manifest
from mimscale.errors import UserError
from mimscale.evals.metrics import mean_per_class, top1
from mimscale.evals.parallel import all_rows, rows_of
from mimscale.evals.protocols.base import Context, Features, Protocol, Results

PIECE = 4096  # training samples on the device at a time


class KnnConfig(Strict):
    k: int = Field(20, ge=1, description="neighbours that vote")
    temperature: float = Field(0.07, gt=0, description="of the votes, whose weight is exp(similarity / temperature)")


class Knn(Protocol):
    """k nearest neighbours by cosine similarity; nothing is trained

    Source: Wu et al., CVPR 2018 (arXiv 1805.01978), sec. 3.4. k = 20 and temperature 0.07 as in DINO (Caron et al.,
    ICCV 2021, arXiv 2104.14294; its eval_knn.py). The search is exact.
    """

    Config = KnnConfig
    metrics: ClassVar = {"knn": "kNN (k = {k})"}
    constants: ClassVar = {"similarity": "cosine"}

    def __init__(self, config: KnnConfig, context: Context) -> None:
        super().__init__(config, context)
        self.config: KnnConfig = config

    @classmethod
    def check(cls, config: KnnConfig, train: Manifest, val: Manifest) -> None:
        if config.k > train.samples:
            raise UserError(
                f"--k {config.k} is more than the {train.samples} training samples of {train.location}; lower it"
            )

    def run(self, train: Features, val: Features) -> Results:
        c = self.context
        mine = rows_of(len(val.values), c.rank, c.world)
        neighbours = Neighbours(val.values[mine], self.config.k)
        for values, labels in zip(train.values.split(PIECE), train.labels.split(PIECE), strict=True):
            neighbours.add(values.to(c.device), labels.to(c.device))
        predicted = neighbours.votes(c.classes, self.config.temperature).argmax(dim=1)
        predicted = all_rows(predicted, len(val.values), c.rank, c.world)
        return {
            "knn": top1(predicted, val.labels, c.classes),
            "knn_per_class": mean_per_class(predicted, val.labels, c.classes),
        }


class Neighbours:
    """The k training samples of highest cosine similarity to each query: exact, over a training set in pieces.

    queries: [Q, D], kept where they are (host memory will do). k, chunk: queries that go to the device at a time.
    similarity: float32 [Q, k] and labels: int64 [Q, k] are sorted, best first; -inf while fewer than k were added.
    """

    def __init__(self, queries_QD: Tensor, k: int, chunk: int = 8192) -> None:
        self.queries = F.normalize(queries_QD.float(), dim=1)
        self.chunk = chunk
        self.similarity = torch.full((len(queries_QD), k), -torch.inf)
        self.labels = torch.zeros(len(queries_QD), k, dtype=torch.int64)

    def add(self, train_ND: Tensor, labels_N: Tensor) -> None:
        """A piece of the training set, on the device that computes."""
        train = F.normalize(train_ND.float(), dim=1)
        for start in range(0, len(self.queries), self.chunk):
            rows = slice(start, start + self.chunk)
            similarity = self.queries[rows].to(train.device) @ train.T
            labels = labels_N.expand(len(similarity), -1)
            similarity = torch.cat([self.similarity[rows].to(train.device), similarity], dim=1)
            labels = torch.cat([self.labels[rows].to(train.device), labels], dim=1)
            best, index = similarity.topk(self.similarity.shape[1], dim=1)
            self.similarity[rows] = best.cpu()
            self.labels[rows] = labels.gather(1, index).cpu()

    def votes(self, classes: int, temperature: float) -> Tensor:
        """float32 [Q, classes]: each neighbour votes for its label with weight exp(similarity / temperature)."""
        weights = (self.similarity / temperature).exp()
        return torch.zeros(len(weights), classes).scatter_add_(1, self.labels, weights)
