"""Members that operating systems add, and members of one sample that stand apart."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.imagenet import read_21k
from mimscale.data.manifest import Manifest
from mimscale.data.sidecars import is_sidecar

JPEG = b"\xff\xd8\xff\xe0 the header only"
APPLE = b"\0\5\x16\7" + bytes(100)


def write(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path.parent


def sample(number: int, between: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return [(f"{number}.jpg", JPEG + bytes([number])), *between, (f"{number}.cls", str(number).encode())]


@pytest.mark.parametrize(
    "name",
    [
        *("._a.jpg", "x/._a.jpg", "__MACOSX/a.jpg", ".DS_Store", "a/Thumbs.db", ".git/a.jpg", "@eaDir/a.jpg/M.jpg"),
        *("THUMBS.DB", "x/ehthumbs.db", "Desktop.ini", "$RECYCLE.BIN/a.jpg", "#recycle/b.jpg", "Icon\r", "lost+found"),
    ],
)
def test_names_of_sidecars(name: str) -> None:
    assert is_sidecar(name)
    assert not is_sidecar("./a.jpg") and not is_sidecar("a/b.c.jpg") and not is_sidecar("__meta__/a.jpg")


@pytest.mark.parametrize("name", ["._0.jpg", "__MACOSX/._0.jpg", ".DS_Store", "Thumbs.db", "README"])
def test_they_are_skipped_and_counted_and_split_no_sample(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "in" / "a.tar", [m for n in range(3) for m in sample(n, [(name, APPLE)])])
    assert main(["index", str(folder)]) == 0
    manifest = Manifest.load(folder)
    assert manifest.labels is not None and manifest.labels.tolist() == [0, 1, 2]
    assert len(manifest.file.left_out) == 3
    assert main(["verify", str(folder)]) == 0


def test_a_second_sample_with_the_same_key_is_kept(tmp_path: Path) -> None:
    folder = write(tmp_path / "in" / "a.tar", [*sample(1, []), *sample(1, []), ("1.jpg", JPEG), ("1.cls", b"5")])
    assert main(["index", str(folder)]) == 0
    labels = Manifest.load(folder).labels
    assert labels is not None and labels.tolist() == [1, 1, 5]


@pytest.mark.parametrize("first", ["jpg", "cls"])
def test_image_and_label_apart_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], first: str) -> None:
    data = {"jpg": JPEG, "cls": b"1"}
    second = "cls" if first == "jpg" else "jpg"
    members = [(f"{n}.{kind}", data[kind]) for kind in (first, second) for n in range(3)]
    assert main(["index", str(write(tmp_path / "in" / "a.tar", members))]) == 2
    assert "image and label of 3 samples of" in (error := capsys.readouterr().err) and "stand together" in error


@pytest.mark.parametrize(
    "members",
    [
        [("a.jpg", JPEG), ("a.jpg", JPEG + b"2"), ("a.cls", b"1")],  # one name, two images, one label
        [("./a.jpg", JPEG), ("a.cls", b"1")],  # added from another folder
        [("a.cls", b"1"), ("._b.jpg", APPLE), ("b.jpg", JPEG), ("b.cls", b"2"), ("a.jpg", JPEG)],
    ],
)
def test_a_label_elsewhere_is_not_called_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], members: list[tuple[str, bytes]]
) -> None:
    assert main(["index", str(write(tmp_path / "in" / "a.tar", members))]) == 2
    assert "image and label of 1 samples of" in (error := capsys.readouterr().err) and "no label" not in error


def test_archives_of_classes(tmp_path: Path) -> None:
    folder = write(tmp_path / "in" / "n01.tar", [("n01_1.JPEG", JPEG), ("._n01_1.JPEG", JPEG)])
    (folder / "._n01.tar").write_bytes(APPLE)
    source = read_21k(folder)
    assert source.classes == ["n01"] and len(source.items) == 1 and source.skipped == {"hidden or of the system": 2}
    whole = write(
        tmp_path / "whole" / "all.tar", [("n01.tar", (folder / "n01.tar").read_bytes()), ("._n01.tar", APPLE)]
    )
    again = read_21k(whole / "all.tar")
    assert again.classes == ["n01"] and len(again.items) == 1 and again.skipped == {"hidden or of the system": 2}


@pytest.mark.parametrize(
    "names", [("images/{}.jpg", "labels/{}.cls"), ("{}.jpg", "{}_label.cls"), ("x/{}.v2.jpg", "y/{}.cls")]
)
def test_labels_that_stand_beside_no_image_are_not_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: tuple[str, str]
) -> None:
    """As after packing two folders: the set would have no labels at all."""
    members = [(name.format(n), data) for name, data in zip(names, (JPEG, b"1"), strict=True) for n in range(3)]
    folder = write(tmp_path / "in" / "a.tar", [*members, ("z.jpg", JPEG)])
    assert main(["index", str(folder)]) == 2
    assert "3 labels .cls in" in (error := capsys.readouterr().err) and "do not stand beside an image" in error
    assert main(["index", str(folder), "--label", "none"]) == 0 and Manifest.load(folder).labels is None
    write(folder / "b.tar", sample(2, []))  # one label is beside its image: then those without are counted
    capsys.readouterr()
    assert main(["index", str(folder)]) == 2 and "have no label cls" in capsys.readouterr().err
    assert main(["index", str(folder), "--skip-unlabelled"]) == 0 and Manifest.load(folder).samples == 1
