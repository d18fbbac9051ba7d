"""A tiny run of each protocol with the figure that it should report: what breaks silently is seen.

Three random ViTs on scikit-learn's digits, enlarged to 32 pixels. The figures were printed by this file at the commit
that added them; a margin is what seeds of the network and rounding may move the mean of three.
"""

from __future__ import annotations

import statistics

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from mimscale.evals.features import frozen, random_like
from mimscale.evals.logistic_regression import Rows, fit, predict
from mimscale.evals.protocols.base import Context, Features
from mimscale.evals.runner import protocol_class
from mimscale.models.config import StudentConfig
from mimscale.models.vit import ViT

REFERENCE = {  # protocol -> (key in the results, percent, margin in points)
    "knn": ("knn", 47.9, 1.0),
    "linear": ("linear", 77.3, 1.0),
    "lowshot": ("lowshot", 42.3, 2.0),
    "retrieval": ("map", 20.0, 0.5),
    "ridge": ("ridge", 79.6, 1.0),
}


@pytest.fixture(scope="module")
def sets() -> list[tuple[Features, Features]]:
    """(train, val) of each seed and pooling, mean first: 600 images each."""
    x, y = (array[:1200] for array in load_digits(return_X_y=True))
    images = torch.from_numpy(x).float().view(-1, 1, 8, 8) / 8 - 1
    images = F.interpolate(images, 32, mode="bilinear").expand(-1, 3, -1, -1)
    labels = torch.from_numpy(y).long()
    student = ViT(StudentConfig(width=32, depth=2, heads=2, patch=8), 32)
    out = []
    for pool in ("mean", "cls"):
        for seed in range(3):
            values = frozen(random_like(student, seed), [pool])(images)[pool]
            out.append((Features(values[:600], labels[:600]), Features(values[600:1200], labels[600:1200])))
    return out


@pytest.mark.parametrize("name", REFERENCE)
def test_reports_its_figure(sets: list[tuple[Features, Features]], name: str) -> None:
    key, expected, margin = REFERENCE[name]
    kind = protocol_class(name)
    found = []
    for seed, (train, val) in enumerate(sets[:3]):
        protocol = kind(kind.Config(), Context(10, seed, torch.device("cpu")))
        results = protocol.run(train, val)
        found.append(results[key])
        if kind.unit == "percent top-1":  # of classes of nearly one size
            assert results[f"{key}_per_class"] == pytest.approx(results[key], abs=2.0)
    assert abs(statistics.fmean(found) - expected) <= margin, found


@pytest.mark.parametrize("l2", [1e-2, 1e-4])
def test_logistic_regression_is_scikit_learns(sets: list[tuple[Features, Features]], l2: float) -> None:
    """Three networks, two poolings: at equal l2 within 0.2 points, which is one image."""
    for train, val in sets:
        rows = Rows(train.values, train.labels, 10, torch.device("cpu"))
        x, x_val = rows.scaling(train.values).double().numpy(), rows.scaling(val.values)
        reference = LogisticRegression(C=1 / (l2 * len(x)), max_iter=20_000, tol=1e-6).fit(x, train.labels.numpy())
        ours = fit(rows, l2)
        accuracy = 100 * float((predict(ours, x_val) == val.labels).float().mean())
        assert ours.converged
        assert abs(accuracy - 100 * reference.score(x_val.double().numpy(), val.labels.numpy())) <= 0.2
