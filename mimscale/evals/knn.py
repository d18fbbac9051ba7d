"""Weighted k-nearest-neighbour classification (Wu et al., CVPR 2018, sec. 3.4; DINO's k = 20, temperature 0.07)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

K = 20
TEMPERATURE = 0.07


class Neighbours:
    """The k training samples of highest cosine similarity to each query: exact, over a training set in pieces.

    queries: [Q, D], kept where they are (host memory will do). k, chunk: queries that go to the device at a time.
    similarity: float32 [Q, k] and labels: int64 [Q, k] are sorted, best first; -inf while fewer than k were added.
    """

    def __init__(self, queries_QD: Tensor, k: int = K, chunk: int = 8192) -> None:
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

    def votes(self, classes: int, temperature: float = TEMPERATURE) -> Tensor:
        """float32 [Q, classes]: each neighbour votes for its label with weight exp(similarity / temperature)."""
        weights = (self.similarity / temperature).exp()
        return torch.zeros(len(weights), classes).scatter_add_(1, self.labels, weights)


def knn(
    train_ND: Tensor, labels_N: Tensor, queries_QD: Tensor, classes: int, k: int = K, temperature: float = TEMPERATURE
) -> Tensor:
    """Votes float32 [Q, classes] of a training set that fits into memory."""
    neighbours = Neighbours(queries_QD, k)
    neighbours.add(train_ND, labels_N)
    return neighbours.votes(classes, temperature)
