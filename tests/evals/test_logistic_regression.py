from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mimscale.evals import logistic_regression
from mimscale.evals.logistic_regression import fit, predict, standardised

CPU = torch.device("cpu")
Digits = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def standard(digits: Digits) -> Digits:
    features, labels, val_features, truth = digits
    train, val = standardised(features.clone(), val_features.clone())
    return train, labels, val, truth


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_fit_equals_scikit_learn(standard: Digits, l2: float, monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels, val, _ = standard
    monkeypatch.setattr(logistic_regression, "CHUNK", 400)  # so that the sum over pieces is seen to be the whole
    ours = fit(train, labels, torch.arange(len(train)), 10, l2, None, CPU)
    reference = LogisticRegression(C=1 / (l2 * len(train)), max_iter=5000, tol=1e-8).fit(train.numpy(), labels.numpy())
    torch.testing.assert_close(ours.weight, torch.from_numpy(reference.coef_).float(), atol=2e-3, rtol=2e-2)
    assert (predict(ours, val).numpy() == reference.predict(val.numpy())).mean() > 0.995


def test_a_fit_says_whether_it_converged(standard: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels, _, _ = standard
    rows = torch.arange(len(train))
    done = fit(train, labels, rows, 10, 1e-1, None, CPU)
    assert done.converged and 5 < done.iterations < logistic_regression.MAX_ITERATIONS
    again = fit(train, labels, rows, 10, 1e-1, done, CPU)
    assert again.converged and again.iterations < done.iterations
    monkeypatch.setattr(logistic_regression, "MAX_ITERATIONS", 5)
    cut = fit(train, labels, rows, 10, 1e-1, None, CPU)
    assert not cut.converged and cut.iterations == 5
    monkeypatch.setattr(logistic_regression, "MAX_ITERATIONS", 200)
    monkeypatch.setattr(logistic_regression, "MAX_EVALUATIONS", 8)
    cut = fit(train, labels, rows, 10, 1e-1, None, CPU)
    assert not cut.converged and cut.iterations < 8


def test_standardised_with_the_training_set_and_a_constant_channel_at_zero() -> None:
    train, val = standardised(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([[4.0, 5.0]]))
    assert train.tolist() == [[-1.0, 0.0], [1.0, 0.0]] and val.tolist() == [[2.0, 0.0]]


def test_fit_uses_only_its_rows(standard: Digits) -> None:
    train, labels, _, _ = standard
    rows = torch.arange(0, 1297, 3)
    some = fit(train, labels, rows, 10, 1e-2, None, CPU)
    alone = fit(train[rows], labels[rows], torch.arange(len(rows)), 10, 1e-2, None, CPU)
    torch.testing.assert_close(some.weight, alone.weight)
