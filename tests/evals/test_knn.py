from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from mimscale.evals.knn import TEMPERATURE, Neighbours, knn
from mimscale.evals.metrics import top1


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x, y = load_digits(return_X_y=True)
    features, labels = torch.from_numpy(x).float(), torch.from_numpy(y).long()
    return features[:1297], labels[:1297], features[1297:], labels[1297:]


def test_equals_scikit_learn(digits: tuple[torch.Tensor, ...]) -> None:
    train, labels, queries, truth = digits
    reference = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / TEMPERATURE))
    reference.fit(train.double().numpy(), labels.numpy())
    votes = knn(train, labels, queries, classes=10)
    shares = votes / votes.sum(dim=1, keepdim=True)
    expected = torch.from_numpy(reference.predict_proba(queries.double().numpy())).float()
    torch.testing.assert_close(shares, expected, atol=1e-4, rtol=0)
    assert top1(votes.argmax(1), truth, 10) == pytest.approx(
        100 * reference.score(queries.double().numpy(), truth.numpy()), abs=1e-4
    )


@pytest.mark.parametrize(("piece", "chunk"), [(1, 500), (7, 64), (300, 33), (1297, 1)])
def test_pieces_of_any_size_give_the_same_neighbours(digits: tuple[torch.Tensor, ...], piece: int, chunk: int) -> None:
    train, labels, queries, _ = digits
    queries = queries[:60]
    whole, pieces = Neighbours(queries), Neighbours(queries, chunk=chunk)
    whole.add(train, labels)
    for x, y in zip(train.split(piece), labels.split(piece), strict=True):
        pieces.add(x, y)
    torch.testing.assert_close(pieces.similarity, whole.similarity)
    torch.testing.assert_close(pieces.votes(10), whole.votes(10), rtol=1e-4, atol=0)
    assert (pieces.similarity.diff(dim=1) <= 0).all()


def test_fewer_neighbours_than_k_have_no_vote() -> None:
    votes = knn(torch.eye(3), torch.tensor([0, 1, 2]), torch.tensor([[1.0, 0, 0]]), classes=3, k=5)
    assert votes.argmax(1).tolist() == [0] and torch.isfinite(votes).all()
