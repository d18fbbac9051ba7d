from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mimscale.data.manifest import Manifest
from mimscale.errors import UserError
from mimscale.evals.logistic_regression import Rows, predict, scaling_of
from mimscale.evals.metrics import top1
from mimscale.evals.protocols.base import Context, Features
from mimscale.evals.protocols.lowshot import (
    L2_GRID,
    L2_OF_ONE_SHOT,
    LowShot,
    LowShotConfig,
    drawn_ids,
    few_labels,
    listed_ids,
)

CPU = torch.device("cpu")
Digits = tuple[Tensor, Tensor, Tensor, Tensor]


def test_draws_are_balanced_seeded_and_differ() -> None:
    labels, config = np.repeat(np.arange(10), 30), LowShotConfig(shots=5)
    draws = [drawn_ids(labels, config, seed=1, draw=d) for d in range(3)]
    for ids in draws:
        assert len(set(ids.tolist())) == 50
        assert np.bincount(labels[ids]).tolist() == [5] * 10
    assert len({tuple(sorted(ids.tolist())) for ids in draws}) == 3
    assert np.array_equal(draws[1], drawn_ids(labels, config, seed=1, draw=1))
    with pytest.raises(UserError, match="--shots 31: class 0 has 30"):
        drawn_ids(labels, LowShotConfig(shots=31), seed=1, draw=0)


def test_percent_of_each_class_and_at_least_one() -> None:
    labels = np.repeat([0, 1, 2], [300, 30, 3])
    assert np.bincount(labels[drawn_ids(labels, LowShotConfig(percent=10), 0, 0)]).tolist() == [30, 3, 1]
    assert np.bincount(labels[drawn_ids(labels, LowShotConfig(percent=1), 0, 0)]).tolist() == [3, 1, 1]
    assert LowShot.headings(LowShotConfig(percent=1)) == {"lowshot": "1 % of the labels"}
    assert LowShot.headings(LowShotConfig()) == {"lowshot": "5 labels per class"}
    with pytest.raises(ValidationError, match="--shots and --percent exclude each other"):
        LowShotConfig(shots=1, percent=1)


@pytest.mark.parametrize("shots", [1, 5])
def test_few_labels_are_enough_to_learn(digits: Digits, shots: int) -> None:
    train, labels, val, truth = digits
    scaling = scaling_of(train)
    ids = drawn_ids(labels.numpy(), LowShotConfig(shots=shots), seed=0, draw=0)
    classifier, l2 = few_labels(Rows(train[ids], labels[ids], 10, CPU, scaling=scaling, parts=1), labels[ids])
    assert l2 == L2_OF_ONE_SHOT if shots == 1 else l2 in L2_GRID
    assert top1(predict(classifier, scaling(val)), truth, 10) > (45 if shots == 1 else 75)


def test_the_result_is_the_mean_over_draws(digits: Digits) -> None:
    train, labels, val, truth = digits
    scaling, config = scaling_of(train), LowShotConfig(shots=2, draws=2)
    expected, strengths = [], []
    for draw in range(2):
        ids = drawn_ids(labels.numpy(), config, seed=3, draw=draw)
        classifier, l2 = few_labels(Rows(train[ids], labels[ids], 10, CPU, scaling=scaling, parts=1), labels[ids])
        expected.append(top1(predict(classifier, scaling(val)), truth, 10))
        strengths.append(l2)
    result = LowShot(config, Context(10, 3, CPU)).run(Features(train, labels), Features(val, truth))
    assert result["lowshot"] == pytest.approx(statistics.fmean(expected))
    assert result["lowshot_sd"] == pytest.approx(statistics.stdev(expected))
    assert (result["lowshot_draws"], result["lowshot_l2"]) == (expected, strengths)
    assert result["labels"] == [20, 20] and len(set(result["labels_sha256"])) == 2 and not result["warnings"]


def test_one_draw_has_no_spread(digits: Digits) -> None:
    train, labels, val, truth = digits
    protocol = LowShot(LowShotConfig(shots=1, draws=1), Context(10, 0, CPU))
    result = protocol.run(Features(train, labels), Features(val, truth))
    assert "lowshot_sd" not in result and result["lowshot_draws"] == [result["lowshot"]]


def test_a_list_names_the_labelled_images(data: tuple[Path, Path], tmp_path: Path) -> None:
    manifest = Manifest.load(data[0])
    keys = manifest.keys()
    assert keys == [manifest.key(number) for number in range(manifest.samples)]
    path = tmp_path / "1percent.txt"
    path.write_text(f"{keys[7]}.JPEG\n\n{keys[3]}.JPEG\nonly_here.JPEG\n")
    assert listed_ids(path, [*keys, "class/only_here"]).tolist() == [3, 7, 120]
    path.write_text(f"{keys[7].rpartition('/')[2]}.JPEG\n")  # one in each class
    with pytest.raises(UserError, match="is no sample of the training set"):
        listed_ids(path, keys)
    path.write_text("n01440764_10026.JPEG\n")
    with pytest.raises(UserError, match="'n01440764_10026' is no sample of the training set"):
        listed_ids(path, keys)
    for text, reason in (("", "is empty"), (None, "cannot be read")):
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        with pytest.raises(UserError, match=reason):
            LowShot.check(LowShotConfig(list=path), manifest, manifest)
