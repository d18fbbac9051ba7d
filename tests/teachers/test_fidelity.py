"""The three numbers of the precision table, against cases that can be worked out by hand."""

from __future__ import annotations

import pytest
import torch

from mimscale.teachers.fidelity import cosine, relative_error, top_overlap


def test_relative_error() -> None:
    reference = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
    assert relative_error(reference, reference) == 0
    assert relative_error(reference + torch.tensor([0.3, 0.4]), reference) == pytest.approx(0.5 * 2**0.5 / 5)


def test_cosine_is_per_token() -> None:
    reference = torch.tensor([[[1.0, 0.0], [0.0, 9.0]]])
    ours = torch.tensor([[[1.0, 1.0], [0.0, 1.0]]])
    assert cosine(ours, reference) == pytest.approx(((1 + 0.5**0.5) / 2, 0.5**0.5))


def test_top_overlap() -> None:
    reference = torch.arange(10.0).expand(2, 10)
    ours = torch.stack([reference[0], reference[0].flip(0)])
    assert top_overlap(reference, reference, 0.3) == 1
    assert top_overlap(ours, reference, 0.3) == pytest.approx(0.5)
    swapped = reference.clone()
    swapped[:, [6, 7]] = swapped[:, [7, 6]]  # one of the three largest falls out
    assert top_overlap(swapped, reference, 0.3) == pytest.approx(2 / 3)
    assert top_overlap(swapped, reference, 0.01) == 1  # at least one token counts
