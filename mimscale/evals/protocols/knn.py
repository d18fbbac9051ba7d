"""Weighted k-nearest-neighbour classification."""

from __future__ import annotations

from itertools import product
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mimscale.config.base import Strict
from mimscale.data.manifest import Manifest
from mimscale.errors import UserError
from mimscale.evals.metrics import mean_per_class, top1
from mimscale.evals.parallel import all_gather, parts_of
from mimscale.evals.protocols.base import Context, Features, Protocol, Results

PIECE = 16_384  # training samples on the device at a time, at most
USUAL, REPORTED = (10, 20, 100, 200), 20

K = Annotated[int, Field(ge=1)]
Temperature = Annotated[float, Field(gt=0)]


class KnnConfig(Strict):
    k: tuple[K, ...] | None = Field(
        None, min_length=1, description="numbers of neighbours that vote, reported first (None: 20, 10, 100 and 200)"
    )
    temperature: tuple[Temperature, ...] = Field(
        (0.07,), min_length=1, description="of the votes, whose weight is exp(similarity / temperature); reported first"
    )


class Knn(Protocol):
    """k nearest neighbours by cosine similarity; nothing is trained

    Source: Wu et al., CVPR 2018 (arXiv 1805.01978), sec. 3.4. k = 20 and temperature 0.07 as in DINO (Caron et al.,
    ICCV 2021, arXiv 2104.14294; its eval_knn.py). The search is exact, and one search serves every k and temperature.
    The figure `knn` is that of the first of each, which nothing chooses on the validation set.
    """

    Config = KnnConfig
    metrics: ClassVar = {"knn": "kNN"}
    constants: ClassVar = {"similarity": "cosine"}
    departs: ClassVar = (
        "papers take the class token and k = 20 or the best k on val; here the first k is the figure, and --pool cls "
        "measures the class token",
    )

    def __init__(self, config: KnnConfig, context: Context) -> None:
        super().__init__(config, context)
        self.config: KnnConfig = config

    @classmethod
    def check(cls, config: KnnConfig, train: Manifest, val: Manifest) -> None:
        largest = max(config.k or (1,))
        if largest > train.samples:
            raise UserError(
                f"--k {largest} is more than the {train.samples} training samples of {train.location}; lower it"
            )

    @classmethod
    def headings(cls, config: KnnConfig) -> dict[str, str]:
        first, *others = product(_wanted(config), config.temperature)
        out = {"knn": f"kNN (k = {first[0]})" + (f", T = {first[1]:g}" if len(config.temperature) > 1 else "")}
        for k, temperature in others:
            text = f", T = {temperature:g}" if len(config.temperature) > 1 else ""
            out[_key(config, k, temperature)] = f"k = {k}{text}"
        return out

    def run(self, train: Features, val: Features) -> Results:
        c, config = self.context, self.config
        wanted = [k for k in _wanted(config) if k <= len(train.values)] or [len(train.values)]
        neighbours = Neighbours(val.values, max(wanted))
        for rows in parts_of(len(train.values), c.rank, c.world, PIECE):
            neighbours.add(train.values[rows].to(c.device), train.labels[rows].to(c.device))
        neighbours.merge()
        out: Results = {}
        for k, temperature in product(wanted, config.temperature):
            predicted = neighbours.predicted(c.classes, temperature, k)
            if not out:
                out["knn_per_class"] = mean_per_class(predicted, val.labels, c.classes)
            out[_key(config, k, temperature) if "knn" in out else "knn"] = top1(predicted, val.labels, c.classes)
        return {**out, "k": wanted[0], "temperature": config.temperature[0]}


def _wanted(config: KnnConfig) -> tuple[int, ...]:
    """All k, the reported one first."""
    return config.k or (REPORTED, *(k for k in USUAL if k != REPORTED))


def _key(config: KnnConfig, k: int, temperature: float) -> str:
    return f"knn_k{k}" + ("" if len(config.temperature) == 1 else f"_t{temperature:g}")


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
        for rows in self._chunks():
            similarity = self.queries[rows].to(train.device) @ train.T
            labels = labels_N.expand(len(similarity), -1)
            self._keep(rows, similarity, labels)

    def merge(self) -> None:
        """Of what all ranks have added, the best: the same on every rank. Each must call it, with the same queries."""
        for rows in self._chunks():
            similarity, labels = all_gather(self.similarity[rows]), all_gather(self.labels[rows])
            if len(similarity) > 1:
                self.similarity[rows] = -torch.inf
                self._keep(rows, torch.cat(similarity, dim=1), torch.cat(labels, dim=1))

    def _chunks(self) -> list[slice]:
        return [slice(start, start + self.chunk) for start in range(0, len(self.queries), self.chunk)]

    def _keep(self, rows: slice, similarity: Tensor, labels: Tensor) -> None:
        """The best of what there is and of further candidates [n, m]."""
        similarity = torch.cat([self.similarity[rows].to(similarity.device), similarity], dim=1)
        labels = torch.cat([self.labels[rows].to(labels.device), labels], dim=1)
        best, index = similarity.topk(self.similarity.shape[1], dim=1)
        self.similarity[rows] = best.cpu()
        self.labels[rows] = labels.gather(1, index).cpu()

    def votes(self, classes: int, temperature: float, k: int | None = None, rows: slice = slice(None)) -> Tensor:
        """float32 [Q, classes]: each neighbour votes for its label with weight exp((similarity - best) / temperature).

        Without the best similarity, which scales all votes of a query alike, the weights overflow at low temperatures.
        k: of the nearest only. rows: of these queries only.
        """
        similarity = self.similarity[rows, :k]
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        return torch.zeros(len(weights), classes).scatter_add_(1, self.labels[rows, :k], weights)

    def predicted(self, classes: int, temperature: float, k: int | None = None) -> Tensor:
        """int64 [Q], the class of the largest vote."""
        return torch.cat([self.votes(classes, temperature, k, rows).argmax(dim=1) for rows in self._chunks()])
