from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifierCV
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mimscale.evals.protocols import ridge
from mimscale.evals.protocols.base import Context, Features
from mimscale.evals.protocols.ridge import L2_GRID, Ridge, RidgeConfig, fit

Digits = tuple[Tensor, Tensor, Tensor, Tensor]


def sklearns(x: Tensor, y: Tensor) -> tuple[StandardScaler, RidgeClassifierCV]:
    scaler = StandardScaler().fit(x.double().numpy())
    return scaler, RidgeClassifierCV(alphas=L2_GRID).fit(scaler.transform(x.double().numpy()), y.numpy())


@pytest.mark.parametrize("count", [40, 1297])  # fewer samples than channels, and more
def test_equals_scikit_learn(digits: Digits, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, x_val, y_val = digits
    x, y = x[:count], y[:count]
    monkeypatch.setattr(ridge, "CHUNK", 100)
    scaler, theirs = sklearns(x, y)
    ours = fit(x, y, 10)
    assert ours.l2 == theirs.alpha_
    decisions = theirs.decision_function(scaler.transform(x_val.double().numpy()))
    np.testing.assert_allclose(ours.outputs(x_val).numpy(), decisions, atol=1e-6)
    context = Context(10, 0, torch.device("cpu"))
    results = Ridge(RidgeConfig(), context).run(Features(x, y), Features(x_val, y_val))
    share, each = (of(y_val.numpy(), decisions.argmax(axis=1)) for of in (accuracy_score, balanced_accuracy_score))
    assert results["ridge"] == pytest.approx(100 * share, abs=1e-3) and results["l2"] == theirs.alpha_
    assert results["ridge_per_class"] == pytest.approx(100 * each, abs=1e-3)


def test_a_dead_channel_and_an_absent_class_do_no_harm(digits: Digits) -> None:
    x, y, x_val, _ = digits
    dead = torch.cat([x, torch.full((len(x), 1), 3.0)], dim=1)
    dead_val = torch.cat([x_val, torch.full((len(x_val), 1), 3.0)], dim=1)
    plain, found = fit(x, y, 10), fit(dead, y, 11)
    assert found.l2 == plain.l2
    torch.testing.assert_close(found.outputs(dead_val)[:, :10], plain.outputs(x_val))
    assert (found.outputs(dead_val).argmax(dim=1) < 10).all()
