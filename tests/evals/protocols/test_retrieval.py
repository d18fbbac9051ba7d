from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch import Tensor

from mimscale.evals.protocols import retrieval
from mimscale.evals.protocols.base import Context, Features
from mimscale.evals.protocols.retrieval import Retrieval, RetrievalConfig, average_precision

Digits = tuple[Tensor, Tensor, Tensor, Tensor]
CONTEXT = Context(10, 0, torch.device("cpu"))


def test_equals_scikit_learn(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels, queries, truth = digits
    train, labels, queries, truth = train[:400], labels[:400], queries[:40], truth[:40]
    monkeypatch.setattr(retrieval, "SIMILARITIES", 1000)  # two queries at a time
    result = Retrieval(RetrievalConfig(), CONTEXT).run(Features(train, labels), Features(queries, truth))
    similarity = F.normalize(queries, dim=1) @ F.normalize(train, dim=1).T
    expected = [
        average_precision_score((labels == y).numpy(), s.numpy()) for s, y in zip(similarity, truth, strict=True)
    ]
    assert result["map"] == pytest.approx(100 * sum(expected) / 40, abs=1e-3) and result["queries"] == 40


def test_by_hand() -> None:
    """Right at ranks 1 and 3: (1 + 2/3) / 2. A class that training lacks has no precision, and a warning."""
    similarity = torch.tensor([[0.9, 0.8, 0.7], [0.1, 0.2, 0.3]])
    found = average_precision(similarity, torch.tensor([0, 5]), torch.tensor([0, 1, 0]))
    assert found[0] == pytest.approx(5 / 6) and found[1].isnan()
    train = Features(torch.eye(3), torch.tensor([0, 1, 0]))
    result = Retrieval(RetrievalConfig(), CONTEXT).run(train, Features(torch.eye(3)[:2], torch.tensor([0, 5])))
    assert result["queries"] == 1 and "1 images of val have a class without a training image" in result["warnings"][0]
