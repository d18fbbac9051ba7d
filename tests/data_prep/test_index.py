"""Shards written by other programs can be indexed and read by id, without copying them."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_prep.__main__ import main
from mimscale.data.manifest import Manifest
from mimscale.data.synthetic import make_image_folder


@pytest.fixture
def wds_shards(tmp_path: Path) -> Path:
    """Two shards by webdataset's own writer, with its defaults, and with members that mimscale does not read."""
    images = sorted(make_image_folder(tmp_path / "images", classes=2, per_class=4, side=32).glob("*/*.jpg"))
    folder = tmp_path / "wds"
    folder.mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"train-{shard:04d}.tar")) as writer:
            for number in range(4 * shard, 4 * shard + 4):
                meta = {"class": 7 - number, "caption": "words"}
                writer.write(
                    {
                        "__key__": f"some/{number:03d}",
                        "jpg": images[number].read_bytes(),
                        "cls": number % 2,
                        "json": meta,
                    }
                )
    return folder


def index(*arguments: object) -> int:
    return main(["index", *map(str, arguments)])


def contents(folder: Path) -> list[tuple[str, bytes, int]]:
    manifest = Manifest.load(folder)
    labels = manifest.labels if manifest.labels is not None else np.full(manifest.samples, -1)
    return [(manifest.key(n), manifest.read(n), int(labels[n])) for n in range(manifest.samples)]


def by_webdataset(folder: Path) -> list[tuple[str, bytes, int]]:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return [(s["__key__"], s["jpg"], int(s["cls"])) for s in webdataset.WebDataset(urls, shardshuffle=False)]


def test_in_place_with_the_samples_that_webdataset_reads(wds_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in wds_shards.iterdir()}
    assert index(wds_shards) == 0
    assert "8 images in 2 shards" in capsys.readouterr().out
    assert contents(wds_shards) == by_webdataset(wds_shards)
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in wds_shards.glob("*.tar")}
    assert after == before
    assert index(wds_shards) == 0  # a second time, over the first manifest
    assert main(["verify", "--decode", str(wds_shards)]) == 0
    assert "no checksums" in capsys.readouterr().out


@pytest.mark.multi
def test_links_in_another_folder_and_checksums(
    wds_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert index(wds_shards, "--to", tmp_path / "links", "--checksums", "--jobs", 2) == 0
    assert contents(tmp_path / "links") == by_webdataset(wds_shards)
    assert sorted(os.listdir(wds_shards)) == ["train-0000.tar", "train-0001.tar"]
    assert all(shard.sha256 for shard in Manifest.load(tmp_path / "links").file.shards)
    with open(wds_shards / "train-0001.tar", "r+b") as file:
        file.seek(Manifest.load(tmp_path / "links").offsets[5] + 900)
        file.write(b"changed")
    assert main(["verify", str(tmp_path / "links")]) == 1
    assert "train-0001.tar: its checksum differs from the manifest" in capsys.readouterr().out
    assert index(wds_shards, "--to", tmp_path / "links") == 2
    assert "is not empty" in capsys.readouterr().err


def test_other_labels(wds_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("".join(f"name {n}\n" for n in range(8)))
    assert index(wds_shards, "--to", tmp_path / "a", "--label", "json:class", "--classes", tmp_path / "names.txt") == 0
    manifest = Manifest.load(tmp_path / "a")
    assert manifest.labels is not None and manifest.labels.tolist() == list(range(7, -1, -1))
    assert manifest.classes == [f"name {n}" for n in range(8)]
    assert index(wds_shards, "--to", tmp_path / "b", "--label", "none") == 0
    assert Manifest.load(tmp_path / "b").labels is None
    for name in "ab":
        assert main(["verify", "--decode", str(tmp_path / name)]) == 0


def write(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path.parent


JPEG = b"\xff\xd8\xff\xe0 the header only"


def test_unusual_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = {
        "a.b/one.JPG": JPEG,
        "a.b/one.seg.png": b"\x89PNG\r\n\x1a\n",
        "two.txt": b"no image",
        "three.jpg": b"<html>",
        "__meta__": b"x",
    }
    folder = write(tmp_path / "in" / "a.tar", members)
    assert index(folder) == 0
    file = Manifest.load(folder).file
    assert (file.samples, file.left_out) == (
        1,
        {
            "a.tar/two": "no image among .txt",
            "a.tar/three": "not an image that is read: a page of HTML",
            "a.tar/__meta__": "no extension",
        },
    )
    assert index(folder, "--image", "seg.png") == 0
    assert Manifest.load(folder).read(0) == b"\x89PNG\r\n\x1a\n"
    folder = write(tmp_path / "twice" / "a.tar", {"one.jpg": JPEG, "one.png": b"\x89PNG\r\n\x1a\n"})
    assert index(folder) == 2
    assert "has images jpg, png; choose with --image" in capsys.readouterr().err
    assert os.listdir(folder) == ["a.tar"]


class MakesFolderWhenUnpickled:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("unpickled",)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(MakesFolderWhenUnpickled())
    names = ("pyd", "pkl", "pickle", "pth", "npy")
    folder = write(tmp_path / "in" / "a.tar", {"one.jpg": JPEG, **{f"one.{name}": data for name in names}})
    assert index(folder) == 0
    assert main(["verify", str(folder)]) == 0
    assert contents(folder) == [("one", JPEG, -1)] and not (tmp_path / "unpickled").exists()
    for name in names:
        assert index(folder, "--label", name) == 2  # a label is a number as text
    assert not (tmp_path / "unpickled").exists()
    pickle.loads(data)
    assert (tmp_path / "unpickled").exists()


def test_mistakes_are_named(wds_shards: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: object) -> str:
        assert index(*arguments) == 2
        *bad, error = capsys.readouterr().err.splitlines()
        assert all(line.startswith("bad: ") or "read before" in line for line in bad) and error.startswith(
            "data_prep: "
        )
        return "\n".join([*bad, error])

    assert "no such folder" in refused(tmp_path / "nowhere")
    assert "holds no .tar files" in refused(tmp_path)
    assert "was written by data_prep" in refused(shards)
    assert "8 of 8 samples of" in refused(wds_shards, "--label", "index")
    assert "json is not a class number" in refused(wds_shards, "--label", "json")
    assert "json:caption is not a class number" in refused(wds_shards, "--label", "json:caption")
    assert "hold no images" in refused(wds_shards, "--image", "png", "--label", "none")
    (tmp_path / "names.txt").write_text("only one\n")
    assert "label 1 has no name among the 1 class names" in refused(wds_shards, "--classes", tmp_path / "names.txt")
    assert "cannot be read" in refused(wds_shards, "--classes", tmp_path / "nowhere.txt")
    data = (wds_shards / "train-0001.tar").read_bytes()
    (wds_shards / "train-0001.tar").write_bytes(data[: len(data) // 2])
    assert "not a complete tar archive" in refused(wds_shards)
    (wds_shards / "train-0001.tar").rename(wds_shards / "train 1.tar")
    assert "rename it" in refused(wds_shards)
    assert not (wds_shards / "manifest.json").exists()
    negative = write(tmp_path / "negative" / "a.tar", {"one.jpg": JPEG, "one.cls": b"-3"})
    assert "label -3 is below 0" in refused(negative)
    large = write(tmp_path / "large" / "a.tar", {"one.jpg": JPEG, "one.json": json.dumps({"a": "x" * 70000}).encode()})
    assert "its label .json has" in refused(large, "--label", "json:a")


def test_labels_by_their_values_and_samples_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = [b"2", b" 2.0\n", b"2e0", b"-1", b"", b"nan", b"10"]
    members = {f"{n}.{kind}": data for n, v in enumerate(values) for kind, data in (("jpg", JPEG), ("cls", v))}
    folder = write(tmp_path / "in" / "a.tar", members)
    assert index(folder) == 2
    assert "3 of 7 samples of" in (error := capsys.readouterr().err) and "the first is 'a.tar/3'" in error
    assert index(folder, "--skip-unlabelled") == 0
    assert [label for _, _, label in contents(folder)] == [2, 2, 2, 10]
    assert set(Manifest.load(folder).file.left_out.values()) == {"no label"}
    capsys.readouterr()
    assert main(["verify", str(folder)]) == 0
    for value, message in ((b"2.5", "is no whole number"), (b"1585214400", "is an id"), (b"cat", "not a class number")):
        assert index(write(tmp_path / "bad" / "a.tar", {"0.jpg": JPEG, "0.cls": value})) == 2
        assert message in capsys.readouterr().err
