"""Shards from IDX files in Fashion-MNIST's form, of our own making."""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data_prep.__main__ import main
from data_prep.fashion import CLASSES
from mimscale.data.manifest import Manifest

SIDE = 6
COUNTS = {"train": 23, "t10k": 11}
TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
Bytes = NDArray[np.uint8]


def idx(values: Bytes) -> bytes:
    return struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def arrays(begin: str) -> tuple[Bytes, Bytes]:
    random = np.random.default_rng(len(begin))
    count = COUNTS[begin]
    images = random.integers(0, 256, (count, SIDE, SIDE), dtype=np.uint8)
    return images, (np.arange(count) % 10).astype(np.uint8)


def write_files(folder: Path, pack: bool = False) -> Path:
    folder.mkdir(parents=True)
    for begin in COUNTS:
        for name, values in zip(("images-idx3", "labels-idx1"), arrays(begin), strict=True):
            path = folder / f"{begin}-{name}-ubyte"
            if pack:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(idx(values)))
            else:
                path.write_bytes(idx(values))
    return folder


def run(*words: object) -> int:
    return main(["fashion", *map(str, words)])


def hashes(folder: Path) -> dict[str, str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.mark.parametrize("pack", [False, True])
def test_every_pixel_and_label(tmp_path: Path, pack: bool) -> None:
    out = tmp_path / "out"
    assert run(write_files(tmp_path / "in", pack), out, "--shard-samples", 8) == 0
    for split, begin in (("train", "train"), ("val", "t10k")):
        manifest = Manifest.load(out / split)
        images, labels = arrays(begin)
        assert manifest.classes == list(CLASSES) and manifest.samples == len(images)
        assert manifest.labels is not None
        found = {}
        for sample in range(manifest.samples):
            row = int(manifest.key(sample).split("-")[1])
            found[row] = np.asarray(Image.open(io.BytesIO(manifest.read(sample))))
            assert manifest.labels[sample] == labels[row]
        assert np.array_equal(np.stack([found[row] for row in range(len(images))]), images)


def test_torchvisions_folder_where_both_files_are(tmp_path: Path) -> None:
    raw = write_files(tmp_path / "root" / "FashionMNIST" / "raw")
    for path in list(raw.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(b"not read")
    assert run(tmp_path / "root", tmp_path / "out") == 0
    assert Manifest.load(tmp_path / "out" / "val").samples == COUNTS["t10k"]


def test_a_stopped_run_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_files(tmp_path / "in", pack=True)
    assert run(source, tmp_path / "whole", "--shard-samples", 4) == 0
    whole = hashes(tmp_path / "whole")
    for path in (tmp_path / "whole").glob("*/shard-000001*"):  # as if it had been stopped
        path.unlink()
    for path in (tmp_path / "whole").glob("*/manifest*"):
        path.unlink()
    capsys.readouterr()
    assert run(source, tmp_path / "whole", "--shard-samples", 4) == 0
    assert "5 of 6 shards were already written" in capsys.readouterr().err
    assert hashes(tmp_path / "whole") == whole
    assert run(source, tmp_path / "parts", "--shard-samples", 4, "--part", "1/2") == 0
    assert run(source, tmp_path / "parts", "--shard-samples", 4, "--part", "0/2") == 0
    assert hashes(tmp_path / "parts") == whole


def test_other_pixels_of_the_same_shape_are_another_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_files(tmp_path / "in")
    assert run(source, tmp_path / "out") == 0
    before = hashes(tmp_path / "out")
    images = source / TRAIN_IMAGES
    images.write_bytes(images.read_bytes()[:-1] + bytes([images.read_bytes()[-1] ^ 1]))
    capsys.readouterr()
    assert run(source, tmp_path / "out") == 2
    assert "was made differently (other names, sizes, labels or pixels in the source)" in capsys.readouterr().err
    assert hashes(tmp_path / "out") == before


def cut(data: bytes) -> bytes:
    return data[:-1]


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "cut": (TRAIN_IMAGES, cut, "is cut short: 843 bytes, its header (23, 6, 6) asks for 844"),
    "longer": (TRAIN_LABELS, lambda data: data + b"0", "goes on after its end: 32 bytes"),
    "header": (TRAIN_IMAGES, lambda data: data[:9], "it ends in its header of 16 bytes"),
    "magic": (TRAIN_IMAGES, lambda data: b"\0\0\x0d\3" + data[4:], "begins with 00000d03"),
    "labels for images": (TRAIN_IMAGES, lambda data: idx(np.zeros(4, np.uint8)), "begins with 00000801"),
    "empty file": (TRAIN_LABELS, lambda data: b"", "begins with nothing"),
    "no rows": (TRAIN_LABELS, lambda data: idx(np.zeros(0, np.uint8)), "holds no values"),
    "fewer labels": (TRAIN_LABELS, lambda data: idx(np.zeros(22, np.uint8)), "holds 23 images and"),
    "label": (TRAIN_LABELS, lambda data: idx(np.full(23, 10, np.uint8)), "holds the label 10"),
    "gzip": (TRAIN_IMAGES, lambda data: gzip.compress(data)[:-9], "is a damaged gzip file"),
    "gzip bits": (TRAIN_IMAGES, lambda data: gzip.compress(data)[:40] + b"\xff" * 40, "is a damaged gzip file"),
    "MNIST's labels": (
        TRAIN_LABELS,
        lambda data: idx(np.zeros(60_000, np.uint8)),
        "(MNIST has files of the same names)",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_one_line_for_a_bad_file_and_nothing_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_files(tmp_path / "in")
    file, change, message = DAMAGE[name]
    (source / file).write_bytes(change((source / file).read_bytes()))
    if name == "MNIST's labels":
        (source / TRAIN_IMAGES).write_bytes(idx(np.zeros((60_000, 1, 1), np.uint8)))
    assert run(source, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and file in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_file_and_a_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_files(tmp_path / "in")
    (source / "t10k-labels-idx1-ubyte").unlink()
    assert run(source, tmp_path / "out") == 2 and not (tmp_path / "out").exists()
    assert "lacks t10k-labels-idx1-ubyte(.gz)" in capsys.readouterr().err
    assert run(tmp_path / "nowhere", tmp_path / "out") == 2
    assert "holds no train-images-idx3-ubyte(.gz)" in capsys.readouterr().err


def test_files_that_changed_since_they_were_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The worker reads the file again, and finds other images."""
    from data_prep.fashion import read_fashion
    from data_prep.item_reader import ItemReader
    from mimscale.errors import UserError

    source = write_files(tmp_path / "in")
    items = read_fashion(source, "train").items
    (source / TRAIN_IMAGES).write_bytes(idx(np.zeros((5, SIDE, SIDE), np.uint8)))
    with ItemReader().shard(items) as read, pytest.raises(UserError, match="has changed since it was listed"):
        read(items[-1])
