"""The numbers of the robustness tables, each against a computation by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mimscale.data.manifest import Manifest
from mimscale.data.synthetic import make_image_folder
from mimscale.errors import UserError
from mimscale.evals.robustness.classes import BY_INDEX, BY_NAME, outputs_of, predicted
from mimscale.evals.robustness.corruptions import (
    ALEXNET,
    SEVERITIES,
    corrupted_sets,
    corruption_errors,
    mean_corruption_error,
)
from mimscale.evals.robustness.real import real_accuracy, real_labels
from tests.evals.conftest import shards

WNIDS = ["n01440764", "n01443537", "n01484850", "n01491361"]


def test_mce_by_hand() -> None:
    """Gaussian noise errs by 10, 20, 30, 40, 50 %, brightness always, all others never.

    Sums over the severities: 1.5 and 5; of AlexNet 5 x 0.886428 = 4.43214 and 5 x 0.564592 = 2.82296. So CE is 33.8437
    and 177.1191 %, and mCE (33.8437 + 177.1191) / 15 = 14.0642 %.
    """
    errors = {(name, severity): 0.0 for name in ALEXNET for severity in SEVERITIES}
    for severity in SEVERITIES:
        errors["gaussian_noise", severity] = severity / 10
        errors["brightness", severity] = 1.0
    ce = corruption_errors(errors)
    assert ce["gaussian_noise"] == pytest.approx(33.8437, abs=1e-4)
    assert ce["brightness"] == pytest.approx(177.1191, abs=1e-4)
    assert sum(value == 0 for value in ce.values()) == 13
    assert mean_corruption_error(errors) == pytest.approx(14.0642, abs=1e-4)


def test_alexnet_itself_has_100() -> None:
    assert len(ALEXNET) == 15
    errors = {(name, severity): ALEXNET[name] for name in ALEXNET for severity in SEVERITIES}
    assert mean_corruption_error(errors) == pytest.approx(100)


def test_a_subset_is_asked_for_the_best_of_its_own_classes() -> None:
    outputs, how = outputs_of([WNIDS[3], WNIDS[1]], WNIDS, "set")
    assert outputs.tolist() == [3, 1] and how == BY_NAME
    logits = torch.tensor([[9.0, 1.0, 9.0, 2.0], [9.0, 3.0, 0.0, 2.0]])  # the best outputs are of other classes
    assert predicted(logits, outputs).tolist() == [0, 1]


def test_numbered_folders_are_indices() -> None:
    """`data_prep folder` sorts the folders of ImageNet-V2 as text: label 1 is the folder 10."""
    outputs, how = outputs_of(["0", "10", "2"], [f"n{n:08d}" for n in range(11)], "set")
    assert outputs.tolist() == [0, 10, 2] and how == BY_INDEX
    with pytest.raises(UserError, match=r"set: 1 of 2 classes are not among the 4 .* the first is '4'"):
        outputs_of(["1", "4"], ["0", "1", "2", "3"], "set")  # names of a classifier may be numbers, too
    with pytest.raises(UserError, match="not among"):
        outputs_of(["0", "4"], WNIDS, "set")


def test_classes_that_do_not_map() -> None:
    with pytest.raises(UserError, match="2 of 3 classes are not among the 4 of the classifier, the first is 'cat'"):
        outputs_of(["cat", WNIDS[0], "dog"], WNIDS, "shards/a")


def test_real_counts_any_of_its_labels_and_skips_images_without() -> None:
    labels = [[3, 1], [], [2], [0]]
    assert real_accuracy(torch.tensor([1, 0, 2, 3]), labels) == pytest.approx(66.6667)
    assert real_accuracy(torch.tensor([0, 0, 0, 0]), labels) == pytest.approx(33.3333)


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images in the layout of the sorted validation set, with ImageNet's names."""
    root = tmp_path_factory.mktemp("val")
    made = make_image_folder(root / "images", classes=4, per_class=2, side=32)
    for label, folder in enumerate(sorted(made.iterdir())):
        for number, file in enumerate(sorted(folder.iterdir())):
            file.rename(folder / f"ILSVRC2012_val_{1 + label + 4 * number:08d}.JPEG")
        folder.rename(made / WNIDS[label])
    return shards(made, root / "shards")


def test_real_follows_the_numbers_of_the_images(val: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(val)
    rows = [[number % 4] if number != 5 else [] for number in range(8)]
    (tmp_path / "real.json").write_text(json.dumps(rows))
    assert manifest.labels is not None
    labels = real_labels(tmp_path / "real.json", manifest, 4)
    for sample, row in enumerate(labels):
        number = int(manifest.key(sample)[-8:])
        assert row == rows[number - 1] and (not row or row == [manifest.labels[sample]])
    assert real_accuracy(torch.from_numpy(manifest.labels.copy()), labels) == 100


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([[0]] * 7, "has labels of 7 images, --val .* holds 8"),
        ([[0]] * 7 + [[4]], "has class 4 of ImageNet's sorted wnids, --val .* has 4"),
        ([[0]] * 7 + [3], "is not a list of lists"),
        ([[True]] * 8, "is not a list of lists"),
        ({"0": [1]}, "is not a list of lists"),
    ],
)
def test_real_files_that_do_not_fit(val: Path, tmp_path: Path, rows: object, said: str) -> None:
    (tmp_path / "real.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=said):
        real_labels(tmp_path / "real.json", Manifest.load(val), 4)


def test_real_needs_the_names_of_the_images(data: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text(json.dumps([[0]] * 45))
    with pytest.raises(UserError, match="the keys of --val .* are not val_1 to val_45"):
        real_labels(tmp_path / "real.json", Manifest.load(data[1]), 3)
    with pytest.raises(UserError, match="cannot be read"):
        real_labels(tmp_path / "nothing.json", Manifest.load(data[1]), 3)


def test_a_missing_corruption(tmp_path: Path) -> None:
    for name in ALEXNET:
        for severity in SEVERITIES:
            (tmp_path / name / str(severity)).mkdir(parents=True)
            (tmp_path / name / str(severity) / "manifest.json").touch()
    assert len(corrupted_sets(tmp_path)) == 75
    (tmp_path / "fog" / "3" / "manifest.json").unlink()
    with pytest.raises(UserError, match="1 of 75 data sets CORRUPTION/SEVERITY .* first is .*fog/3"):
        corrupted_sets(tmp_path)
