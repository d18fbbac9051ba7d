from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mimscale.evals import logistic_regression
from mimscale.evals.logistic_regression import Rows, fit, predict, scaling_of

CPU = torch.device("cpu")
Digits = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def rows(digits: Digits) -> Rows:
    return Rows(digits[0], digits[1], 10, CPU)


@pytest.mark.parametrize("l2", [1e-1, 1e-3, 1e-5])
def test_fit_equals_scikit_learn(digits: Digits, rows: Rows, l2: float, monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels, val, truth = digits
    monkeypatch.setattr(logistic_regression, "CHUNK", 100)  # so that the sum over pieces is seen to be the whole
    ours = fit(rows, l2)
    x, x_val = rows.scaling(train).double().numpy(), rows.scaling(val)
    reference = LogisticRegression(C=1 / (l2 * len(train)), max_iter=5000, tol=1e-8).fit(x, labels.numpy())
    if l2 > 1e-4:  # weaker, the loss hardly depends on them
        torch.testing.assert_close(ours.weight, torch.from_numpy(reference.coef_).float(), atol=2e-3, rtol=2e-2)
    predicted = predict(ours, x_val).numpy()
    assert (predicted == reference.predict(x_val.double().numpy())).mean() > 0.995
    assert ours.converged and abs((predicted == truth.numpy()).mean() - reference.score(x_val, truth)) <= 0.002


def test_a_fit_says_whether_it_converged(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    done = fit(rows, 1e-1)
    assert done.converged and 5 < done.iterations < 200
    again = fit(rows, 1e-1, done)
    assert again.converged and again.iterations < done.iterations
    monkeypatch.setattr(logistic_regression, "MAX_ITERATIONS", 5)
    cut = fit(rows, 1e-1)
    assert not cut.converged and cut.iterations == 5


def test_scaling_is_the_training_sets_own_and_a_constant_channel_is_zero() -> None:
    train, val = torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([[4.0, 5.0]])
    scaling = scaling_of(train)
    assert scaling(train).tolist() == [[-1.0, 0.0], [1.0, 0.0]] and scaling(val).tolist() == [[2.0, 0.0]]
    assert train.tolist() == [[1.0, 5.0], [3.0, 5.0]]  # features may be mapped from the cache


def test_fit_uses_only_its_samples(digits: Digits, rows: Rows) -> None:
    train, labels, _, _ = digits
    use = torch.zeros(1297, dtype=torch.bool)
    use[::3] = True
    some = fit(rows, 1e-2, use_N=use)
    alone = fit(Rows(train[use], labels[use], 10, CPU, scaling=rows.scaling), 1e-2)
    torch.testing.assert_close(some.weight, alone.weight, atol=1e-4, rtol=1e-3)


def test_what_the_parts_of_two_ranks_hold_is_the_whole(digits: Digits, rows: Rows) -> None:
    """The sums of real ranks are compared in test_ranks.py."""
    train, labels, _, _ = digits
    halves = [Rows(train, labels, 10, CPU, rank, 2, rows.scaling) for rank in range(2)]
    assert [len(half.parts) for half in halves] == [4, 4]
    for number, (x, y) in rows.parts.items():
        (held,) = [half.parts[number] for half in halves if number in half.parts]
        assert torch.equal(held[0], x) and torch.equal(held[1], y)
    held_rows = np.concatenate([np.arange(1297)[rows] for half in halves for rows in half.slices.values()])
    assert sorted(held_rows) == list(range(1297))
