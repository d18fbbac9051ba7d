"""Damage of every kind is found, and nothing else is called damage."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.__main__ import main
from mimscale.data.manifest import Manifest, save_manifest


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def verify(folder: Path, capsys, *options: str) -> tuple[int, str]:
    code = main(["verify", str(folder), *options])
    return code, capsys.readouterr().out


@pytest.mark.multi
@pytest.mark.parametrize("options", [[], ["--decode"], ["--decode", "--jobs", "2"]])
def test_whole(shards: Path, capsys, options: list[str]) -> None:
    code, said = verify(shards, capsys, *options)
    assert code == 0 and said.endswith("whole\n")
    assert "80 samples in 5 shards" in said and "4 classes of 20 to 20 samples" in said


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def test_damaged_picture(copy: Path, capsys) -> None:
    manifest = Manifest.load(copy)
    sample = int(manifest.counts[0]) + 3
    overwrite(copy / "shard-000001.tar", int(manifest.offsets[sample]), b"not a picture")
    code, said = verify(copy, capsys)
    assert code == 1 and "damaged: shard-000001.tar: its checksum" in said and said.endswith("1 faults\n")
    code, said = verify(copy, capsys, "--decode")
    assert code == 1 and f"shard-000001.tar: sample {sample} ({manifest.key(sample)})" in said


def test_damaged_header_and_cut_and_missing_shards(copy: Path, capsys) -> None:
    manifest = Manifest.load(copy)
    overwrite(copy / "shard-000000.tar", int(manifest.offsets[2]) - 512, bytes(range(256)) * 2)
    os.truncate(copy / "shard-000002.tar", 5000)
    (copy / "shard-000003.tar").unlink()
    code, said = verify(copy, capsys, "--decode")
    assert code == 1
    assert "shard-000000.tar: 2 pictures, not 16" in said or "shard-000000.tar: not readable as a tar archive" in said
    assert "shard-000002.tar: 5,000 bytes, not" in said and "ends early" in said
    assert "shard-000003.tar: missing" in said
    assert "shard-000004" not in said


def test_damaged_index_and_labels(copy: Path, capsys) -> None:
    for name in ("index.npy", "labels.npy"):
        array = np.load(copy / name)
        array[5] += 1
        np.save(copy / name, array)
    code, said = verify(copy, capsys)
    assert code == 1
    for line in (
        "index.npy: its checksum",
        "labels.npy: its checksum",
        "shard-000000.tar: the index does not fit the members",
        "shard-000000.tar: the labels in the shard are not those of the manifest",
    ):
        assert f"damaged: {line}" in said


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
    code, said = verify(copy, capsys)
    assert code == 1 and "labels run from 0 to 3, for 3 classes" in said


def test_no_manifest(tmp_path: Path, capsys) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "has no manifest.json" in capsys.readouterr().err
