from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mimscale.errors import UserError
from mimscale.evals import logistic_regression
from mimscale.evals.logistic_regression import Classifier, Rows, predict
from mimscale.evals.metrics import top1
from mimscale.evals.protocols import linear
from mimscale.evals.protocols.base import Context, Features
from mimscale.evals.protocols.linear import HOLD_OUT, L2_GRID, Linear, LinearConfig, Search, full_data, hold_out

CPU = torch.device("cpu")
Digits = tuple[Tensor, Tensor, Tensor, Tensor]


def run(digits: Digits, rows: slice = slice(None)) -> dict[str, object]:
    train, labels, val, truth = digits
    protocol = Linear(LinearConfig(), Context(10, 0, CPU))
    return protocol.run(Features(train[rows], labels[rows]), Features(val, truth))


def test_chooses_from_the_grid_learns_and_says_how_long_it_took(digits: Digits) -> None:
    train, labels, val, truth = digits
    result = run(digits)
    rows = Rows(train, labels, 10, CPU)
    found = full_data(rows, hold_out(labels.numpy(), HOLD_OUT, 0))
    assert result["linear"] == top1(predict(found.classifier, rows.scaling(val)), truth, 10) > 90
    assert result["l2"] == found.l2 == found.strengths[int(np.argmax(found.accuracies))]
    assert result["iterations"] == found.classifier.iterations and result["converged"] is True
    assert len(found.accuracies) == len(found.iterations) == len(found.strengths) >= len(L2_GRID)
    assert result["hold_out_accuracy"] == list(found.accuracies)
    assert result["search_iterations"] == list(found.iterations) and min(found.iterations) >= 0


def test_a_fit_that_is_cut_short_warns(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic_regression, "MAX_ITERATIONS", 2)
    result = run(digits, slice(200))
    assert result["converged"] is False and result["iterations"] == 2
    assert "L-BFGS stopped after 2 iterations without having converged" in result["warnings"]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("accuracies", "warning"),
    [
        ((90, 80, 70, 60, 50, 40), "l2 = 1 was chosen, the strongest of the grid"),
        ((90, 90, 70, 60, 50, 40), None),  # a plateau: no sign that stronger is better
        ((40, 80, 90, 60, 50, 40), None),
        ((40, 50, 60, 70, 80, 90), "l2 = 1e-05 was chosen, the weakest of the grid"),
    ],
)
def test_an_edge_of_the_grid_that_wins_warns(accuracies: tuple[float, ...], warning: str | None) -> None:
    classifier = Classifier(torch.zeros(2, 3), torch.zeros(2), 7, True)
    found = Search(classifier, L2_GRID[int(np.argmax(accuracies))], L2_GRID, accuracies, (7,) * 6, (True,) * 6)
    lines = linear._at_the_edge(found)
    assert len(lines) == (warning is not None) and all(line.startswith(str(warning)) for line in lines)
    cut = found._replace(converged=(True, True, True, True, True, False))
    assert linear._unfinished(cut) == ["the search for l2 had not converged at l2 = 1e-05"]


def noisy() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    x, signal = torch.randn(300, 60, generator=random), torch.randn(300, generator=random)
    x[:, 0] = signal
    return x, ((signal + 1.5 * torch.randn(300, generator=random)) > 0).long()


def test_noisy_labels_get_a_strong_l2() -> None:
    """The choice is made on the hold-out: with weak l2 noise would be learnt by heart, which the hold-out punishes."""
    x, labels = noisy()
    held = hold_out(labels.numpy(), HOLD_OUT, 0)
    assert full_data(Rows(x, labels, 2, CPU), held).l2 >= 1e-2


def test_the_grid_goes_on_where_its_end_wins(digits: Digits) -> None:
    x, labels = noisy()
    rows, held = Rows(x, labels, 2, CPU), hold_out(labels.numpy(), HOLD_OUT, 0)
    found = full_data(rows, held, grid=(0.1, 0.01))  # 77.4 and 74.2 on the hold-out
    assert found.strengths == (1.0, 0.1, 0.01) and found.l2 == 0.1 and not linear._at_the_edge(found)
    plateau = full_data(rows, held, grid=(1e-4, 1e-5))
    assert plateau.strengths == (1e-4, 1e-5) and len(set(plateau.accuracies)) == 1
    train, labels = digits[0], digits[1]
    rows, held = Rows(train, labels, 10, CPU), hold_out(labels.numpy(), HOLD_OUT, 0)
    found = full_data(rows, held, grid=(100.0, 10.0))
    assert found.strengths == (100.0, 10.0, 1.0, 0.1, 0.01)  # FURTHER values, and still better at the end
    assert linear._at_the_edge(found) == ["l2 = 0.01 was chosen, the weakest of the grid; a weaker one may be better"]


def test_hold_out_takes_a_part_of_each_class_and_never_all() -> None:
    labels = np.array([0] * 20 + [1] * 5 + [2])
    held = hold_out(labels, 0.1, seed=3)
    assert [int(held[labels == c].sum()) for c in range(3)] == [2, 1, 0]
    assert np.array_equal(held, hold_out(labels, 0.1, seed=3))
    assert not np.array_equal(held, hold_out(labels, 0.1, seed=4))
    with pytest.raises(UserError, match="one sample only, of which none can be held out"):
        hold_out(np.arange(5), 0.1, seed=0)
