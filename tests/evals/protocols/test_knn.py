from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from mimscale.evals.metrics import top1
from mimscale.evals.protocols.base import Context, Features
from mimscale.evals.protocols.knn import Knn, KnnConfig, Neighbours

Digits = tuple[Tensor, Tensor, Tensor, Tensor]


def test_equals_scikit_learn(digits: Digits) -> None:
    train, labels, queries, truth = digits
    reference = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(
        train.double().numpy(), labels.numpy()
    )
    neighbours = Neighbours(queries, 20)
    neighbours.add(train, labels)
    votes = neighbours.votes(10, 0.07)
    shares = votes / votes.sum(dim=1, keepdim=True)
    expected = torch.from_numpy(reference.predict_proba(queries.double().numpy())).float()
    torch.testing.assert_close(shares, expected, atol=1e-4, rtol=0)
    context = Context(10, 0, torch.device("cpu"))
    result = Knn(KnnConfig(), context).run(Features(train, labels), Features(queries, truth))
    assert result["knn"] == top1(votes.argmax(1), truth, 10) and (result["k"], result["temperature"]) == (20, 0.07)
    assert result["knn"] == pytest.approx(100 * reference.score(queries.double().numpy(), truth.numpy()), abs=1e-4)


@pytest.mark.parametrize(("piece", "chunk"), [(1, 500), (7, 64), (300, 33), (1297, 1)])
def test_pieces_of_any_size_give_the_same_neighbours(digits: Digits, piece: int, chunk: int) -> None:
    train, labels, queries, _ = digits
    queries = queries[:60]
    whole, pieces = Neighbours(queries, 20), Neighbours(queries, 20, chunk=chunk)
    whole.add(train, labels)
    for x, y in zip(train.split(piece), labels.split(piece), strict=True):
        pieces.add(x, y)
    torch.testing.assert_close(pieces.similarity, whole.similarity)
    torch.testing.assert_close(pieces.votes(10, 0.07), whole.votes(10, 0.07), rtol=1e-4, atol=0)
    assert (pieces.similarity.diff(dim=1) <= 0).all()


def test_fewer_neighbours_than_k_have_no_vote() -> None:
    neighbours = Neighbours(torch.tensor([[1.0, 0, 0]]), k=5)
    neighbours.add(torch.eye(3), torch.tensor([0, 1, 2]))
    votes = neighbours.votes(3, 0.07)
    assert votes.argmax(1).tolist() == [0] and torch.isfinite(votes).all()


def test_the_options_count() -> None:
    """Three neighbours of the same direction as the query, ten of another that is only a little worse."""
    near, far = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.95, 0.3122]])
    train = Features(torch.cat([near.expand(3, -1), far.expand(10, -1)]), torch.tensor([0] * 3 + [1] * 10))
    val = Features(near, torch.tensor([0]))
    config = KnnConfig(k=(3, 13), temperature=(0.07, 0.01))
    result = Knn(config, Context(2, 0, torch.device("cpu"))).run(train, val)
    cells = {"knn": 100.0, "knn_k3_t0.01": 100.0, "knn_k13_t0.07": 0.0, "knn_k13_t0.01": 100.0}
    assert {key: result[key] for key in cells} == cells
    assert Knn.headings(config).keys() == cells.keys()


def test_one_search_serves_every_k(digits: Digits) -> None:
    train, labels, queries, truth = (tensor[:150] for tensor in digits)
    context = Context(10, 0, torch.device("cpu"))

    def run(config: KnnConfig) -> dict[str, float]:
        return Knn(config, context).run(Features(train, labels), Features(queries, truth))

    usual = run(KnnConfig())  # 200 are more than there are
    assert usual.keys() & Knn.headings(KnnConfig()).keys() == {"knn", "knn_k10", "knn_k100"}
    for k, key in ((20, "knn"), (10, "knn_k10"), (100, "knn_k100")):
        assert run(KnnConfig(k=(k,)))["knn"] == usual[key]
    assert len({usual["knn"], usual["knn_k10"], usual["knn_k100"]}) == 3


@pytest.mark.parametrize("temperature", [1e-2, 1e-4, 1e-9])
def test_at_a_low_temperature_the_nearest_neighbour_decides(digits: Digits, temperature: float) -> None:
    train, labels, queries, _ = digits
    neighbours = Neighbours(queries, 20)
    neighbours.add(train, labels)
    votes = neighbours.votes(10, temperature)
    assert votes.isfinite().all() and (votes.amax(dim=1) >= 1).all()
    if temperature < 1e-3:
        assert torch.equal(votes.argmax(dim=1), neighbours.labels[:, 0])
