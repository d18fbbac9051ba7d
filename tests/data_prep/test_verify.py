"""All kinds of damage are found, and an undamaged data set is reported as such."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.__main__ import main
from mimscale.data.manifest import Manifest, save_manifest
from mimscale.data.synthetic import make_image_folder


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def verify(folder: Path, capsys, *options: str) -> tuple[int, str]:
    code = main(["verify", str(folder), *options])
    return code, capsys.readouterr().out


@pytest.mark.multi
@pytest.mark.parametrize("options", [[], ["--decode"], ["--decode", "--jobs", "2"]])
def test_undamaged(shards: Path, capsys, options: list[str]) -> None:
    code, output = verify(shards, capsys, *options)
    assert code == 0 and output.endswith("undamaged\n")
    assert "80 images in 5 shards" in output and "4 classes of 20 (class_000) to 20" in output


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def test_damaged_image(copy: Path, capsys) -> None:
    manifest = Manifest.load(copy)
    sample = int(manifest.counts[0]) + 3
    overwrite(copy / "shard-000001.tar", int(manifest.offsets[sample]), b"not an image")
    code, output = verify(copy, capsys)
    assert code == 1 and "damaged: shard-000001.tar: its checksum" in output and "15 images, not 16" in output
    code, output = verify(copy, capsys, "--decode")
    assert code == 1 and f"shard-000001.tar: sample {sample} ({manifest.key(sample)})" in output


def test_damaged_header_and_truncated_and_missing_shards(copy: Path, capsys) -> None:
    manifest = Manifest.load(copy)
    overwrite(copy / "shard-000000.tar", int(manifest.offsets[2]) - 512, bytes(range(256)) * 2)
    os.truncate(copy / "shard-000002.tar", 5000)
    (copy / "shard-000003.tar").unlink()
    code, output = verify(copy, capsys, "--decode")
    assert code == 1
    assert "is not a complete tar archive: no member and no end at byte" in output
    assert "shard-000002.tar: 5,000 bytes, not" in output and "ends early" in output
    assert "shard-000003.tar: missing" in output
    assert "shard-000004" not in output


def test_damaged_index_and_labels(copy: Path, capsys) -> None:
    for name in ("index.npy", "labels.npy"):
        array = np.load(copy / name)
        array[5] += 1
        np.save(copy / name, array)
    code, output = verify(copy, capsys)
    assert code == 1
    for line in (
        "index.npy: its checksum",
        "labels.npy: its checksum",
        "shard-000000.tar: the index does not match the members",
        "shard-000000.tar: the labels in the shard differ from the manifest",
    ):
        assert f"damaged: {line}" in output


def test_labels_beyond_the_classes(copy: Path, capsys) -> None:
    manifest = Manifest.load(copy)
    save_manifest(
        copy,
        shards=manifest.file.shards,
        index=np.stack([manifest.offsets, manifest.sizes], axis=1),
        labels=manifest.labels,
        classes=["only", "three", "names"],
        seed=0,
        options={},
        source={},
    )
    code, output = verify(copy, capsys)
    assert code == 1 and "labels run from 0 to 3, for 3 classes" in output


def test_no_manifest(tmp_path: Path, capsys) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "has no manifest.json" in capsys.readouterr().err


def test_copies_of_an_image_are_listed(shards: Path, tmp_path: Path, capsys) -> None:
    root = make_image_folder(tmp_path / "in", classes=2, per_class=8, side=120)
    one, other = sorted(root.glob("*/*.jpg"))[0:16:12]
    (root / "class_000" / "again.jpg").write_bytes(one.read_bytes())
    (root / "class_001" / "again.jpg").write_bytes(one.read_bytes())
    nearly = bytearray(other.read_bytes() + bytes(20_000))  # equal at both ends
    nearly[10_000] ^= 1
    (root / "class_001" / "nearly.jpg").write_bytes(nearly)
    other.write_bytes(other.read_bytes() + bytes(20_000))
    assert main(["folder", str(root), str(tmp_path / "out"), "--shard-samples", "5"]) == 0
    for options in ([], ["--decode"]):
        code, output = verify(tmp_path / "out", capsys, *options)
        assert code == 0 and "2 images are copies of another" in output
        (line,) = (line for line in output.splitlines() if line.startswith("same: "))
        names = {"class_000/again", "class_001/again", "class_000/000000"}
        assert set(line.removeprefix("same: ").split(" = ")) == names
    assert "0 images are copies" in verify(shards, capsys)[1]


def test_expected_number_of_samples(shards: Path, capsys) -> None:
    assert verify(shards, capsys, "--samples", "80")[0] == 0
    code, output = verify(shards, capsys, "--samples", "81")
    assert code == 1 and "damaged: 80 samples, not 81" in output


def test_options_of_another_type(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "copy"))
    text = json.loads((folder / "manifest.json").read_text())
    for name, value in (("label", 0.5), ("image", [1])):
        (folder / "manifest.json").write_text(json.dumps({**text, "options": {**text["options"], name: value}}))
        assert main(["verify", str(folder)]) == 1
        assert f"manifest.json: options.{name} = {value} is no text" in capsys.readouterr().out


def test_arrays_with_one_damaged_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A label of 2^39 asks for a list of 4 TiB, a size of 2^62 for one read of that many bytes."""
    folder, data = tmp_path / "set", b"\xff\xd8\xff\xe0 the header only"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, content in (("0.jpg", data), ("0.cls", b"0"), ("1.jpg", data), ("1.cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert main(["index", str(folder)]) == 0
    for name, damage, message in (
        ("labels.npy", lambda array: array + (1 << 39), "label 549,755,813,889 is no class"),
        ("index.npy", lambda array: array + (1 << 62), "the shard ends early"),
    ):
        whole = (folder / name).read_bytes()
        np.save(folder / name, damage(np.load(folder / name)))
        capsys.readouterr()
        assert main(["verify", str(folder)]) in (1, 2)
        printed = capsys.readouterr()
        assert message in printed.out + printed.err
        (folder / name).write_bytes(whole)
    header = bytearray(whole)
    header[87] = ord("(")  # numpy reads the header as Python's parser does
    (folder / name).write_bytes(header)
    assert main(["info", str(folder)]) == 2 and "is missing or damaged" in capsys.readouterr().err
