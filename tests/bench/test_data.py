"""The benchmarks of the data loader print their tables."""

from __future__ import annotations

import pytest

from mimscale.__main__ import main


def test_order(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--samples", "1e5", "--shard-samples", "100", "--ranks", "16", "--global-batch", "64", "--block", "64"]
    assert main(["bench", "order", *words]) == 0
    shown = capsys.readouterr().out
    assert "100,000 in 1,000" in shown and "0 of 2" in shown and "commit " in shown


@pytest.mark.multi
def test_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "memory", "--samples", "1e5", "--batches", "3"]) == 0
    assert "worker, after 3 batches" in capsys.readouterr().out


def test_too_few_images_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "data", "--images", "128"]) == 2
    assert "--images 128: at least 256" in capsys.readouterr().err


def test_only_some_loaders(capsys: pytest.CaptureFixture[str]) -> None:
    """With a careful user's: torchvision's decoder on uint8."""
    words = ["--images", "320", "--rounds", "1", "--only", "uint8", "read alone"]
    assert main(["bench", "data", *words]) == 0
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    careful = ["torchvision decode_jpeg, uint8, files", "torchvision decode_jpeg, uint8, webdataset"]
    assert rows[2:] == ["mimscale, read alone", "mimscale", *careful]
