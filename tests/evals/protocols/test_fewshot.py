from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
from torch import Tensor

from mimscale.errors import UserError
from mimscale.evals.logistic_regression import L2_GRID, standardised
from mimscale.evals.metrics import top1
from mimscale.evals.protocols.base import Context, Features
from mimscale.evals.protocols.fewshot import L2_OF_ONE_SHOT, FewShot, FewShotConfig, few_shot, few_shot_ids

Digits = tuple[Tensor, Tensor, Tensor, Tensor]


def test_draws_are_balanced_seeded_and_differ() -> None:
    labels = np.repeat(np.arange(10), 30)
    draws = [few_shot_ids(labels, 5, seed=1, draw=d) for d in range(3)]
    for ids in draws:
        assert len(set(ids.tolist())) == 50
        assert np.bincount(labels[ids]).tolist() == [5] * 10
    assert len({tuple(sorted(ids.tolist())) for ids in draws}) == 3
    assert np.array_equal(draws[1], few_shot_ids(labels, 5, seed=1, draw=1))
    with pytest.raises(UserError, match="--shots 31: class 0 has 30"):
        few_shot_ids(labels, 31, seed=1, draw=0)


@pytest.mark.parametrize("shots", [1, 5])
def test_few_labels_are_enough_to_learn(digits: Digits, shots: int) -> None:
    features, labels, val_features, truth = digits
    train, val = standardised(features.clone(), val_features.clone())
    ids = few_shot_ids(labels.numpy(), shots, seed=0, draw=0)
    classifier, l2 = few_shot(train[ids], labels[ids])
    assert l2 == L2_OF_ONE_SHOT if shots == 1 else l2 in L2_GRID
    assert top1(torch.from_numpy(classifier.predict(val.double().numpy())), truth, 10) > (45 if shots == 1 else 75)


def test_the_result_is_the_mean_over_draws(digits: Digits) -> None:
    features, labels, val_features, truth = digits
    train, val = standardised(features.clone(), val_features.clone())
    expected, strengths = [], []
    for draw in range(2):
        ids = few_shot_ids(labels.numpy(), 2, seed=3, draw=draw)
        classifier, l2 = few_shot(train[ids], labels[ids])
        expected.append(top1(torch.from_numpy(classifier.predict(val.double().numpy())), truth, 10))
        strengths.append(l2)
    protocol = FewShot(FewShotConfig(shots=2, draws=2), Context(10, 3, torch.device("cpu")))
    assert protocol.run(Features(features.clone(), labels), Features(val_features.clone(), truth)) == {
        "few_shot": statistics.fmean(expected),
        "few_shot_sd": statistics.stdev(expected),
        "few_shot_draws": expected,
        "few_shot_l2": strengths,
    }


def test_one_draw_has_no_spread(digits: Digits) -> None:
    features, labels, val_features, truth = digits
    protocol = FewShot(FewShotConfig(shots=1, draws=1), Context(10, 0, torch.device("cpu")))
    result = protocol.run(Features(features.clone(), labels), Features(val_features.clone(), truth))
    assert result["few_shot_sd"] == 0 and result["few_shot_draws"] == [result["few_shot"]]
