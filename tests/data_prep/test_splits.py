"""Splits that lie in one folder are not merged."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.splits import check_classes, chosen_files, chosen_images
from data_prep.table import TableOptions, read_table
from mimscale.data.manifest import Manifest
from mimscale.data.synthetic import make_image_folder
from mimscale.errors import UserError


def chosen(names: list[str], pattern: str | None = None) -> list[str]:
    return [path.name for path in chosen_files(Path("x"), [Path("x", name) for name in names], pattern)]


@pytest.mark.parametrize(
    "names",
    [
        ["train-0.tar", "imagenet1k-validation-00.tar"],
        ["TRAIN_00.tar", "Val_00.tar"],
        ["a_train.parquet", "a_test.parquet"],
        ["dev-0.tar", "test-0.tar", "part.tar"],
        ["trainA.parquet", "testA.parquet"],
        ["train.tar", "eval-0.tar"],
        ["cifar_trn.tar", "cifar_holdout.tar"],
        ["train.parquet", "unlabeled.parquet"],
    ],
)
def test_files_of_several_splits_are_refused(names: list[str]) -> None:
    with pytest.raises(UserError, match="holds files of several splits .* choose one with --files '.*' or --files"):
        chosen(names)
    assert chosen(names, names[0]) == names[:1] and chosen(names, "*") == names


@pytest.mark.parametrize(
    "names", [["train-0.tar", "train-1.tar"], ["trained.tar", "latest.tar"], ["val.tar", "valid-1.tar"], []]
)
def test_files_of_one_split(names: list[str]) -> None:
    assert chosen(names) == names


def test_a_pattern_without_a_file() -> None:
    with pytest.raises(UserError, match="matches none of the 1 files"):
        chosen(["a.tar"], "b*")


@pytest.mark.parametrize(
    "names",
    [
        ["train", "val"],
        ["test", "train", "other"],
        ["train"],
        ["Train", "Validation"],
        ["train2017", "val2017", "labels"],
        ["test_set", "training_set"],
        ["ILSVRC_train", "ILSVRC_val", "x"],
        ["train", "extra"],
    ],
)
def test_the_root_of_a_data_set_is_no_folder_of_classes(names: list[str]) -> None:
    with pytest.raises(UserError, match="is the root of a data set"):
        check_classes(Path("x"), names)


@pytest.mark.parametrize(
    "names", [["bus", "train"], ["cat"], ["training set", "x"], ["bullet train", "test tube", "cat"]]
)
def test_folders_of_classes(names: list[str]) -> None:
    check_classes(Path("x"), names)


def test_choose_one_of_the_splits(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(shards / "shard-000000.tar", folder / "set-train-0.tar")
    shutil.copy(shards / "shard-000001.tar", folder / "set-val-0.tar")
    assert main(["index", str(folder)]) == 2
    assert "--files 'set-train*' or --files 'set-val*'" in capsys.readouterr().err
    assert main(["index", str(folder), "--files", "set-train*"]) == 0
    assert [shard.name for shard in Manifest.load(folder).file.shards] == ["set-train-0.tar"]


def test_splits_in_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the Hub stores converted data sets: default/train/0000.parquet."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = sorted(make_image_folder(tmp_path / "images", classes=1, per_class=2, side=16).glob("*/*.jpg"))
    for split, image in zip(("train", "test"), images, strict=True):
        (tmp_path / "in/default" / split).mkdir(parents=True)
        pq.write_table(pa.table({"image": [image.read_bytes()]}), tmp_path / "in/default" / split / "0000.parquet")
    assert main(["table", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert "--files 'default/test/*' or --files 'default/train/*'" in capsys.readouterr().err
    assert main(["table", str(tmp_path / "in"), str(tmp_path / "out"), "--files", "default/train/*"]) == 0
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.samples == 1 and manifest.read(0) == images[0].read_bytes()


def test_a_root_and_a_zip_of_macos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("test", "train", "val"):
        make_image_folder(tmp_path / "in" / split, classes=2, per_class=1, side=16)
    assert main(["folder", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert f"give '{tmp_path}/in/train'" in capsys.readouterr().err
    (tmp_path / "in/train/__MACOSX/class_000").mkdir(parents=True)
    (tmp_path / "in/train/__MACOSX/class_000/._000000.jpg").write_bytes(b"x")
    assert main(["folder", str(tmp_path / "in" / "train"), str(tmp_path / "out")]) == 0
    assert Manifest.load(tmp_path / "out").classes == ["class_000", "class_001"]


@pytest.mark.parametrize(
    ("names", "labelled", "patterns"),
    [
        (["train/a/1.jpg", "train/a/2.jpg", "val/a/1.jpg"], False, ("train/*", "val/*")),
        (["COCO_train2014_1.jpg", "COCO_val2014_2.jpg", "x.jpg"], False, ("COCO_train*", "COCO_val*")),
        (["cat/train_1.jpg", "cat/test_1.jpg", "dog/1.jpg"], True, ("train*", "test*")),
        (["cat/train/1.jpg", "cat/val/1.jpg", "dog/1.jpg"], True, ("*/train/*", "*/val/*")),
    ],
)
def test_images_of_several_splits(
    names: list[str], labelled: bool, patterns: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (image,) = make_image_folder(tmp_path / "one", classes=1, per_class=1, side=16).glob("*/*.jpg")
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, tmp_path / "in" / name)
    words = ["folder", str(tmp_path / "in"), *([] if labelled else ["--unlabelled"])]
    assert main([*words, str(tmp_path / "out")]) == 2
    assert f"--files '{patterns[0]}'" in (error := capsys.readouterr().err) and f"--files '{patterns[1]}'" in error
    if labelled:
        shutil.rmtree(tmp_path / "in" / "dog")  # with a pattern, a class without images
    left = [name for name in names if not name.startswith("dog")]
    for number, (pattern, total) in enumerate(((patterns[0], sum("train" in name for name in left)), ("*", len(left)))):
        assert main([*words, str(tmp_path / f"out{number}"), "--files", pattern]) == 0
        assert Manifest.load(tmp_path / f"out{number}").samples == total


def test_images_that_may_be_called_anything() -> None:
    crawled = ["test.jpg", "train station.jpg", *(f"{n}.jpg" for n in range(3))]
    assert chosen_images(Path("x"), crawled, None, labelled=False) == crawled
    classes = ["bullet train/train 1.jpg", "bullet train/train 2.jpg", "test tube/test 1.jpg", "cat/1.jpg"]
    assert chosen_images(Path("x"), classes, None, labelled=True) == classes
    val = ["n01/ILSVRC2012_val_1.JPEG", "n02/ILSVRC2012_val_2.JPEG"]
    assert chosen_images(Path("x"), val, None, labelled=True) == val
    with pytest.raises(UserError, match="matches none of the 2 files"):
        chosen_images(Path("x"), val, "train*", labelled=True)


@pytest.fixture(params=["csv", "paths in parquet", "images in parquet", "a folder of parquet"])
def table_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[list[str]], Path]:
    """Makes a table of one image per row, whose column "Split" holds the given values."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = sorted(make_image_folder(tmp_path / "in", classes=1, per_class=5, side=16).glob("*/*.jpg"))

    def make(splits: list[str]) -> Path:
        if request.param == "csv":
            rows = "".join(f"{path},{split}\n" for path, split in zip(images, splits, strict=False))
            (tmp_path / "a.csv").write_text(f"path,Split\n{rows}")
            return tmp_path / "a.csv"
        column = [str(path) if request.param == "paths in parquet" else path.read_bytes() for path in images]
        table = pa.table({"image": column[: len(splits)], "Split": splits})
        if request.param != "a folder of parquet":
            pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
            return tmp_path / "a.parquet"
        (tmp_path / "a").mkdir(exist_ok=True)
        for row in range(len(splits)):  # each file is of one split
            pq.write_table(table.slice(row, 1), tmp_path / "a" / f"{row}.parquet")
        return tmp_path / "a"

    return make


def test_rows_of_several_splits_are_refused(table_of: Callable[[list[str]], Path]) -> None:
    with pytest.raises(UserError, match=r"\(2 of train, 1 of val\); choose one with --where 'Split=train' or --where"):
        read_table(table_of(["train", "Train ", "val"]))
    assert len(read_table(table_of(["train", "TRAIN", "x"])).items) == 3


@pytest.mark.parametrize(
    ("where", "rows"), [("Split=train", [0, 2]), ("Split=VAL*", [1, 3]), ("Split=*", range(5)), ("Split=", [4])]
)
def test_rows_of_one_split(table_of: Callable[[list[str]], Path], where: str, rows: Sequence[int]) -> None:
    table = table_of(["train", "val", "Train", "validation", ""])
    every = read_table(table, options=TableOptions(where="Split=*"))
    source = read_table(table, options=TableOptions(where=where))
    assert [(item.path, item.offset) for item in source.items] == [
        (every.items[n].path, every.items[n].offset) for n in rows
    ]
    assert source.skipped.get("other rows than --where takes", 0) == 5 - len(rows)
    assert source.runs is None or sum(source.runs) == len(rows)


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("Split=test", "matches none of the 2 rows of '.*'; 'Split' holds 'train', 'val'$"),
        ("split=train", r"has no column 'split' \(it has .*, Split\); see --where"),
        ("train", "--where 'train' is not COLUMN=VALUE"),
        ("=train", "--where '=train' is not COLUMN=VALUE"),
    ],
)
def test_a_choice_of_rows_that_cannot_be(table_of: Callable[[list[str]], Path], where: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        read_table(table_of(["train", "val"]), options=TableOptions(where=where))


def test_a_list_has_no_columns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a.jpg\n")
    with pytest.raises(UserError, match=r"has no column 'split' \(it has none\)"):
        read_table(tmp_path / "a.txt", options=TableOptions(where="split=train"))
