"""Retrieval of images of the same class."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mimscale.config.base import Strict
from mimscale.evals.parallel import all_sum, parts_of
from mimscale.evals.protocols.base import Features, Protocol, Results

QUERIES = 4096  # at a time, at most
SIMILARITIES = 1 << 28  # on the device at a time


class RetrievalConfig(Strict):
    """No options: nothing is trained or drawn."""


class Retrieval(Protocol):
    """mean average precision of retrieving images of the same class

    Each image of the validation set ranks the whole training set by cosine similarity; right are the images of its
    class. Source: average precision over the whole ranked list, as in Radenovic et al. (CVPR 2018, arXiv 1803.11285),
    whose landmarks DINO (arXiv 2104.14294) ranks; classes take the place of landmarks here.
    """

    Config = RetrievalConfig
    metrics: ClassVar = {"map": "mAP"}
    constants: ClassVar = {"similarity": "cosine"}
    unit: ClassVar = "percent mAP"
    departs: ClassVar = ("classes of this data set in place of the landmarks of revisited Oxford and Paris",)

    def run(self, train: Features, val: Features) -> Results:
        c = self.context
        bank = F.normalize(train.values.to(c.device), dim=1)
        labels = train.labels.to(c.device)
        precisions = torch.zeros(len(val.values), dtype=torch.float64)
        for rows in parts_of(len(val.values), c.rank, c.world, QUERIES):
            queries = F.normalize(val.values[rows].to(c.device), dim=1)
            right = val.labels[rows].to(c.device)
            several = max(1, SIMILARITIES // len(bank))
            pieces = zip(queries.split(several), right.split(several), strict=True)
            precisions[rows] = torch.cat([average_precision(q @ bank.T, y, labels).cpu() for q, y in pieces])
        precisions = all_sum(precisions)
        found = precisions[~precisions.isnan()]
        lost = len(precisions) - len(found)
        return {
            "map": round(100 * float(found.mean()), 4) if len(found) else 0.0,
            "queries": len(found),
            "warnings": [f"{lost:,} images of val have a class without a training image; they are left out"]
            * bool(lost),
        }


def average_precision(similarity_QN: Tensor, classes_Q: Tensor, labels_N: Tensor) -> Tensor:
    """float64 [Q]: mean, over the samples of a query's class, of the precision at their rank; NaN without any.

    similarity: float [Q, N], higher is nearer; of equal ones the first in the data set stands first.
    """
    order = similarity_QN.argsort(dim=1, descending=True, stable=True)
    right = (labels_N[order] == classes_Q[:, None]).double()
    ranks = torch.arange(1, len(labels_N) + 1, device=right.device)
    return (right.cumsum(dim=1) / ranks * right).sum(dim=1) / right.sum(dim=1)
