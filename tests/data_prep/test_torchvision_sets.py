"""`data_prep torchvision NAME`: labelled shards of each data set of the transfer tables, through torchvision's classes.

torchvision compares the checksums of CIFAR, STL-10 and Flowers with lists in its classes. The tests put the checksums
of their small files into these lists, so that the comparison itself is the real one.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from data_prep.__main__ import main
from data_prep.torchvision_sets import PER_CLASS, SETS, SIZES, TOP1
from mimscale.data.manifest import Manifest
from tests.data_prep import torchvision_layouts as layouts


def run(*arguments: object) -> int:
    return main(["torchvision", *map(str, arguments)])


def pixels_of(manifest: Manifest, sample: int) -> np.ndarray:
    image = Image.open(io.BytesIO(manifest.read(sample)))
    assert image.format == "PNG"
    return np.asarray(image)


def label_of(manifest: Manifest, sample: int) -> int:
    assert manifest.labels is not None
    return int(manifest.labels[sample])


def row_of(manifest: Manifest, sample: int) -> int:
    return int(manifest.key(sample).rpartition("/")[2])


@pytest.mark.parametrize("kind", [datasets.CIFAR10, datasets.CIFAR100])
def test_cifar_is_lossless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[datasets.CIFAR10]) -> None:
    made = layouts.cifar(tmp_path / "in", kind, monkeypatch)
    assert run(kind.__name__.lower(), tmp_path / "in", tmp_path / "out", "--shard-samples", 3) == 0
    for ours, theirs in (("train", "train"), ("val", "test")):
        images, labels = made[theirs]
        manifest = Manifest.load(tmp_path / "out" / ours)
        assert manifest.classes == ["cat", "dog", "owl"] and manifest.samples == len(images)
        rows = [row_of(manifest, sample) for sample in range(manifest.samples)]
        assert sorted(rows) == list(range(len(images)))
        assert [label_of(manifest, sample) for sample in range(len(rows))] == [labels[row] for row in rows]
        assert all((pixels_of(manifest, sample) == images[row]).all() for sample, row in enumerate(rows))
        assert manifest.file.source["metric"] == TOP1 and "zlib" in manifest.file.options["png_encoder"]


def test_stl10_with_its_unlabelled_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = layouts.stl10(tmp_path / "in", monkeypatch)
    assert run("stl10", tmp_path / "in", tmp_path / "out") == 0
    for ours, theirs in (("train", "train"), ("val", "test"), ("unlabelled", "unlabeled")):
        official = datasets.STL10(tmp_path / "in", split=theirs)
        manifest = Manifest.load(tmp_path / "out" / ours)
        assert manifest.samples == len(made[theirs])
        for sample in range(manifest.samples):
            row = row_of(manifest, sample)
            image, label = official[row]
            assert (pixels_of(manifest, sample) == np.asarray(image)).all()
            assert (pixels_of(manifest, sample) == made[theirs][row]).all()
            assert (manifest.labels is None) if ours == "unlabelled" else (label_of(manifest, sample) == label)
        assert manifest.classes == (None if ours == "unlabelled" else ["airplane", "bird", "car"])


@pytest.mark.parametrize("sorted_val", [False, True])
def test_tiny_imagenet_before_and_after_its_val_was_sorted(tmp_path: Path, sorted_val: bool) -> None:
    made = layouts.tiny_imagenet(tmp_path / "in", sorted_val)
    root = tmp_path / "in" / ("tiny-imagenet-200" if sorted_val else "")  # the folder itself, or the one above
    assert run("tiny_imagenet", root, tmp_path / "out") == 0
    train, val = (Manifest.load(tmp_path / "out" / split) for split in ("train", "val"))
    assert train.classes == val.classes == layouts.WNIDS and train.samples == 6
    found = {val.key(s).rpartition("/")[2]: (val.read(s), layouts.WNIDS[label_of(val, s)]) for s in range(3)}
    wanted = {f"val_{n}": (made[f"val_{n}.JPEG"], wnid) for n, wnid in enumerate(reversed(layouts.WNIDS))}
    assert found == wanted


@pytest.mark.parametrize("name", [*layouts.FILES, "flowers102"])
def test_files_keep_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    root = tmp_path / "in"
    made = layouts.FILES[name](root) if name in layouts.FILES else layouts.flowers102(root, monkeypatch)
    assert run(name, root, tmp_path / "out") == 0
    manifests = [Manifest.load(tmp_path / "out" / split) for split in ("train", "val")]
    assert tuple(manifest.samples for manifest in manifests) == layouts.COUNTS[name]
    found = {
        manifest.key(sample).rpartition("/images/" if name == "food101" else "/")[2]: (
            manifest.read(sample), label_of(manifest, sample)
        )
        for manifest in manifests
        for sample in range(manifest.samples)
    }  # fmt: skip
    assert found == made
    assert manifests[0].classes == manifests[1].classes
    assert manifests[0].file.source["metric"] == SETS[name].metric
    assert len(manifests[0].classes or ()) == {"flowers102": 102}.get(name, 2)


def test_info_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layouts.stl10(tmp_path / "in", monkeypatch)
    assert run("stl10", tmp_path / "in", tmp_path / "out") == 0
    for split, size in (("val", "8,000 images in 10 classes"), ("unlabelled", "100,000 images in 0 classes")):
        assert main(["info", str(tmp_path / "out" / split)]) == 0
        assert f"torchvision stl10 {split} has {size}: this is not all of it" in capsys.readouterr().out
    assert {kind.split()[1] for kind in SIZES} == set(SETS)
    assert all(f"torchvision {name} {split}" in SIZES for name, kind in SETS.items() for split in kind.splits)


def test_the_metrics_are_those_of_the_protocol() -> None:
    assert {name for name, kind in SETS.items() if kind.metric == PER_CLASS} == {"pets", "flowers102", "aircraft"}


def test_a_second_run_writes_nothing_and_parts_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layouts.stl10(tmp_path / "in", monkeypatch)
    words = ["stl10", tmp_path / "in", tmp_path / "out", "--shard-samples", 2]
    assert run(*words, "--part", "0/2") == 0
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()
    assert run(*words) == 0
    assert "2 of 3 shards were already written" in capsys.readouterr().err
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*.tar")}
    assert run(*words, "--split", "val") == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*.tar")} == files


@pytest.mark.multi
def test_several_processes_write_the_same_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts.stl10(tmp_path / "in", monkeypatch)
    for name, jobs in (("one", 1), ("two", 2)):
        words = ["--shard-samples", 2, "--split", "train", "--jobs", jobs]
        assert run("stl10", tmp_path / "in", tmp_path / name, *words) == 0
    one, two = (Manifest.load(tmp_path / name / "train").fingerprint for name in ("one", "two"))
    assert one == two


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(name: str, root: Path, *words: object) -> str:
        assert run(name, root, tmp_path / "out", *words) == 2
        assert not (tmp_path / "out").exists()
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        return str(error)

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "did you mean 'cifar10'?" in refused("cifar11", empty)
    assert "no such folder" in refused("cifar10", tmp_path / "nowhere")
    for name, kind in SETS.items():
        assert name in (line := refused(name, empty)) and kind.place in line
    root = tmp_path / "in"
    layouts.cifar(root, datasets.CIFAR10, monkeypatch)
    assert "--split unlabelled: cifar10 has the splits train, val" in refused("cifar10", root, "--split", "unlabelled")
    with (root / "cifar-10-batches-py" / "data_batch_3").open("ab") as file:
        file.write(b"x")
    assert "lacks cifar10 or holds a damaged copy" in refused("cifar10", root)
    layouts.food101(root)
    (root / "food-101" / "images" / "waffles" / "1.jpg").unlink()
    assert "1 listed images do not exist" in refused("food101", root)
    layouts.food101(root / "fewer")
    meta = root / "fewer" / "food-101" / "meta" / "test.json"
    meta.write_text(json.dumps({"waffles": json.loads(meta.read_text())["waffles"]}))
    assert "the splits of food101 have different classes: '" in refused("food101", root / "fewer")
    layouts.FILES["cars"](root)
    for path in (root / "stanford_cars").rglob("*.mat"):
        path.write_bytes(b"")
    assert "cannot be read as cars (" in refused("cars", root)
    layouts.aircraft(root)
    (root / "fgvc-aircraft-2013b" / "data" / "images_variant_test.txt").write_text("0 Concorde\n")
    assert "cannot be read as aircraft ('Concorde')" in refused("aircraft", root)
    layouts.tiny_imagenet(root, sorted_val=False)
    (root / "tiny-imagenet-200" / "val" / "val_annotations.txt").unlink()
    assert "No such file" in refused("tiny_imagenet", root)
    for name in ("tiny_imagenet", "cars"):
        assert f"torchvision has no download of {name}; unpack it into" in refused(name, root, "--download")
