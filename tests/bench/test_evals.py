"""`mimscale bench evals` measures every part of an evaluation while training."""

from __future__ import annotations

import re

import pytest

from mimscale.__main__ import main


def test_evals(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--recipe", "mae_tiny", "--images", "2", "--rounds", "1", "--classes", "3"]
    assert main(["bench", "evals", *words, "--train-samples", "300", "--val-samples", "25"]) == 0
    text = capsys.readouterr().out
    parts = ("1016 steps of 32 images", "copy of the student", "forward passes of 325 images", "RankMe and spread")
    assert all(f"| {part} | " in text for part in (*parts, "knn", "ridge"))
    assert re.search(r"\| one evaluation \| [\d.]+ \| [\d.]+% \|", text) and "commit " in text
