"""Shards that other programs wrote become readable by number where they lie."""

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
def foreign(tmp_path: Path) -> Path:
    """Two shards by webdataset's own writer, with its defaults, and things that mimscale does not read."""
    pictures = sorted(make_image_folder(tmp_path / "pictures", classes=2, per_class=4, side=32).glob("*/*.jpg"))
    folder = tmp_path / "foreign"
    folder.mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"train-{shard:04d}.tar")) as writer:
            for number in range(4 * shard, 4 * shard + 4):
                meta = {"class": 7 - number, "caption": "words"}
                writer.write(
                    {
                        "__key__": f"some/{number:03d}",
                        "jpg": pictures[number].read_bytes(),
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


def test_in_place_and_as_webdataset_reads_them(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in foreign.iterdir()}
    assert index(foreign) == 0
    assert "8 pictures in 2 shards" in capsys.readouterr().out
    assert contents(foreign) == by_webdataset(foreign)
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in foreign.glob("*.tar")}
    assert after == before
    assert index(foreign) == 0  # again, over the first
    assert main(["verify", "--decode", str(foreign)]) == 0
    assert "no checksums" in capsys.readouterr().out


@pytest.mark.multi
def test_links_elsewhere_and_checksums(foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert index(foreign, "--to", tmp_path / "links", "--checksums", "--jobs", 2) == 0
    assert contents(tmp_path / "links") == by_webdataset(foreign)
    assert sorted(os.listdir(foreign)) == ["train-0000.tar", "train-0001.tar"]
    assert all(shard.sha256 for shard in Manifest.load(tmp_path / "links").file.shards)
    with open(foreign / "train-0001.tar", "r+b") as file:
        file.seek(Manifest.load(tmp_path / "links").offsets[5] + 900)
        file.write(b"changed")
    assert main(["verify", str(tmp_path / "links")]) == 1
    assert "train-0001.tar: its checksum is not the manifest's" in capsys.readouterr().out
    assert index(foreign, "--to", tmp_path / "links") == 2
    assert "is not empty" in capsys.readouterr().err


def test_other_labels(foreign: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("".join(f"name {n}\n" for n in range(8)))
    assert index(foreign, "--to", tmp_path / "a", "--label", "json:class", "--classes", tmp_path / "names.txt") == 0
    manifest = Manifest.load(tmp_path / "a")
    assert manifest.labels is not None and manifest.labels.tolist() == list(range(7, -1, -1))
    assert manifest.classes == [f"name {n}" for n in range(8)]
    assert index(foreign, "--to", tmp_path / "b", "--label", "none") == 0
    assert Manifest.load(tmp_path / "b").labels is None
    for made in "ab":
        assert main(["verify", "--decode", str(tmp_path / made)]) == 0


def write(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path.parent


JPEG = b"\xff\xd8\xff\xe0 as far as the header goes"


def test_odd_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = {
        "a.b/one.JPG": JPEG,
        "a.b/one.seg.png": b"\x89PNG\r\n\x1a\n",
        "two.txt": b"no picture",
        "three.jpg": b"<html>",
        "__meta__": b"x",
    }
    folder = write(tmp_path / "in" / "a.tar", members)
    assert index(folder) == 0
    file = Manifest.load(folder).file
    assert (file.samples, file.left_out) == (
        1,
        {"two": "no picture", "three": "not a picture", "__meta__": "no picture"},
    )
    assert index(folder, "--image", "seg.png") == 0
    assert Manifest.load(folder).read(0) == b"\x89PNG\r\n\x1a\n"
    folder = write(tmp_path / "twice" / "a.tar", {"one.jpg": JPEG, "one.png": b"\x89PNG\r\n\x1a\n"})
    assert index(folder) == 2
    assert "has pictures jpg, png; choose with --image" in capsys.readouterr().err
    assert os.listdir(folder) == ["a.tar"]


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("sprung",)


def test_pickles_are_never_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(Trap())
    names = ("pyd", "pkl", "pickle", "pth", "npy")
    folder = write(tmp_path / "in" / "a.tar", {"one.jpg": JPEG, **{f"one.{name}": bomb for name in names}})
    assert index(folder) == 0
    assert main(["verify", str(folder)]) == 0
    assert contents(folder) == [("one", JPEG, -1)] and not (tmp_path / "sprung").exists()
    for name in names:
        assert index(folder, "--label", name) == 2  # a label is a number in text
    assert not (tmp_path / "sprung").exists()
    pickle.loads(bomb)
    assert (tmp_path / "sprung").exists()


def test_mistakes_are_named(foreign: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: object) -> str:
        assert index(*arguments) == 2
        error = capsys.readouterr().err
        assert error.strip().count("\n") == 0
        return error

    assert "no such folder" in refused(tmp_path / "nowhere")
    assert "holds no .tar files" in refused(tmp_path)
    assert "was written by data_prep" in refused(shards)
    assert "has no label .index" in refused(foreign, "--label", "index")
    assert "json is not a class number" in refused(foreign, "--label", "json")
    assert "json:caption is not a class number" in refused(foreign, "--label", "json:caption")
    assert "hold no pictures" in refused(foreign, "--image", "png", "--label", "none")
    (tmp_path / "names.txt").write_text("only one\n")
    assert "label 1 is beyond the 1 class names" in refused(foreign, "--classes", tmp_path / "names.txt")
    assert "cannot be read" in refused(foreign, "--classes", tmp_path / "nowhere.txt")
    whole = (foreign / "train-0001.tar").read_bytes()
    (foreign / "train-0001.tar").write_bytes(whole[: len(whole) // 2])
    assert "not a whole tar archive" in refused(foreign)
    (foreign / "train-0001.tar").rename(foreign / "train 1.tar")
    assert "rename it" in refused(foreign)
    assert not (foreign / "manifest.json").exists()
    negative = write(tmp_path / "negative" / "a.tar", {"one.jpg": JPEG, "one.cls": b"-3"})
    assert "label -3 is below 0" in refused(negative)
    large = write(tmp_path / "large" / "a.tar", {"one.jpg": JPEG, "one.json": json.dumps({"a": "x" * 70000}).encode()})
    assert "its label .json has" in refused(large, "--label", "json:a")
