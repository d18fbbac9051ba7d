from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from mimscale.errors import UserError
from mimscale.evals import linear
from mimscale.evals.metrics import top1

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x, y = load_digits(return_X_y=True)
    features, labels = torch.from_numpy(x).float(), torch.from_numpy(y).long()
    train, val = linear.standardised(features[:1297], features[1297:])
    return train, labels[:1297], val, labels[1297:]


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_fit_equals_scikit_learn(digits: tuple[torch.Tensor, ...], l2: float, monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels, val, _ = digits
    monkeypatch.setattr(linear, "CHUNK", 400)  # so that the sum over pieces is seen to be the whole
    ours = linear.fit(train, labels, torch.arange(len(train)), 10, l2, None, CPU)
    reference = LogisticRegression(C=1 / (l2 * len(train)), max_iter=5000, tol=1e-8).fit(train.numpy(), labels.numpy())
    torch.testing.assert_close(ours.weight, torch.from_numpy(reference.coef_).float(), atol=2e-3, rtol=2e-2)
    assert (linear.predict(ours, val).numpy() == reference.predict(val.numpy())).mean() > 0.995


def test_standardised_with_the_training_set_and_a_constant_channel_at_zero() -> None:
    train, val = linear.standardised(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([[4.0, 5.0]]))
    assert train.tolist() == [[-1.0, 0.0], [1.0, 0.0]] and val.tolist() == [[2.0, 0.0]]


def test_fit_sees_only_its_rows(digits: tuple[torch.Tensor, ...]) -> None:
    train, labels, _, _ = digits
    rows = torch.arange(0, 1297, 3)
    some = linear.fit(train, labels, rows, 10, 1e-2, None, CPU)
    alone = linear.fit(train[rows], labels[rows], torch.arange(len(rows)), 10, 1e-2, None, CPU)
    torch.testing.assert_close(some.weight, alone.weight)


def test_full_data_chooses_from_the_grid_and_learns(digits: tuple[torch.Tensor, ...]) -> None:
    train, labels, val, truth = digits
    classifier, l2 = linear.full_data(train, labels, 10, seed=0, device=CPU)
    assert l2 in linear.L2_GRID
    assert top1(linear.predict(classifier, val), truth, 10) > 90


def test_noisy_labels_get_a_strong_l2() -> None:
    """The choice is made on the hold-out: with weak l2 noise would be learnt by heart, which the hold-out punishes."""
    random = torch.Generator().manual_seed(0)
    x, signal = torch.randn(300, 60, generator=random), torch.randn(300, generator=random)
    x[:, 0] = signal
    noisy = ((signal + 1.5 * torch.randn(300, generator=random)) > 0).long()
    _, l2 = linear.full_data(x, noisy, 2, seed=0, device=CPU)
    assert l2 >= 1e-2


def test_hold_out_takes_a_part_of_each_class_and_never_all() -> None:
    labels = np.array([0] * 20 + [1] * 5 + [2])
    held = linear.hold_out(labels, 0.1, seed=3)
    assert [int(held[labels == c].sum()) for c in range(3)] == [2, 1, 0]
    assert np.array_equal(held, linear.hold_out(labels, 0.1, seed=3))
    assert not np.array_equal(held, linear.hold_out(labels, 0.1, seed=4))
    with pytest.raises(UserError, match="at least two"):
        linear.hold_out(np.arange(5), 0.1, seed=0)


def test_few_shot_draws_are_balanced_seeded_and_differ() -> None:
    labels = np.repeat(np.arange(10), 30)
    draws = [linear.few_shot_ids(labels, 5, seed=1, draw=d) for d in range(3)]
    for ids in draws:
        assert len(set(ids.tolist())) == 50
        assert np.bincount(labels[ids]).tolist() == [5] * 10
    assert len({tuple(sorted(ids.tolist())) for ids in draws}) == 3
    assert np.array_equal(draws[1], linear.few_shot_ids(labels, 5, seed=1, draw=1))
    with pytest.raises(UserError, match="--shots 31: class 0 has 30"):
        linear.few_shot_ids(labels, 31, seed=1, draw=0)


@pytest.mark.parametrize("shots", [1, 5])
def test_few_shot_learns(digits: tuple[torch.Tensor, ...], shots: int) -> None:
    train, labels, val, truth = digits
    ids = linear.few_shot_ids(labels.numpy(), shots, seed=0, draw=0)
    predicted = linear.few_shot(train[ids], labels[ids]).predict(val.double().numpy())
    assert top1(torch.from_numpy(predicted), truth, 10) > (45 if shots == 1 else 75)
