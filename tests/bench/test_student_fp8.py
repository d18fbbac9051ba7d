"""The loss curves of fp8: every column sees the same images, and only its arithmetic differs."""

from __future__ import annotations

import pytest

from mimscale.bench import student_fp8
from mimscale.teachers import quantise


@pytest.mark.skipif(bool(quantise.unavailable()), reason="torchao does not fit this torch")
def test_curves_differ_by_rounding_alone() -> None:
    curves = [student_fp8.losses(student_fp8.RECIPE, way, steps=4, batch=8) for way in student_fp8.WAYS.values()]
    for curve in curves[1:]:
        assert curve != curves[0] and curve == pytest.approx(curves[0], rel=0.05)
    assert curves == [student_fp8.losses(student_fp8.RECIPE, way, 4, 8) for way in student_fp8.WAYS.values()]


def test_rows_are_means_of_windows() -> None:
    found = student_fp8.rows([[1.0, 3.0, 5.0], [2.0, 4.0, 6.0], [2.5, 4.5, 6.0]], 1)
    assert found == [["1 - 3", "3.0000", "4.0000", "4.3333", "+0.3333", "+1.0000"]]
