"""Decoding outside of the workers: here on the CPU, by the same code as on a GPU, against the exact path."""

from __future__ import annotations

import shutil
import struct
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from mimscale.data import device_decode, sample_reader
from mimscale.data.config import DataConfig
from mimscale.data.decode import BadImage, Undecoded, decode, deferred
from mimscale.data.loader import TrainLoader
from mimscale.data.manifest import Manifest
from mimscale.errors import UserError
from mimscale.types import Batch, Needs
from tests.data.test_decode import SOURCE, encoded, psnr

NEEDS = Needs(labels=True, uncropped_images=3)


def turned(orientation: int) -> bytes:
    """A JPEG that asks to be shown turned, which TorchCodec does and training must not."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(SOURCE, exif=exif)


def bomb(side: int) -> bytes:
    """A small JPEG whose header tells of a huge one; beyond a limit of its own Pillow raises what is no OSError."""
    data = bytearray(encoded(SOURCE))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", side, side)
    return bytes(data)


def batches(manifest: Manifest, decoder: str, workers: int = 0, steps: int = 4) -> list[Batch]:
    data = DataConfig(shards=str(manifest.folder), image_size=64, workers=workers, decoder=decoder)
    loader = TrainLoader(manifest, data, NEEDS, seed=1, global_batch=20, micro_batch=10, rank=0, world=1)
    made = list(islice(loader, 2 * steps))
    loader.close()
    return made


def assert_close(ours: Batch, plain: Batch) -> None:
    assert ours.stored is None and ours.images.shape == plain.images.shape and ours.images.dtype == torch.uint8
    for name in ("ids", "positions", "boxes", "flips", "labels", "whole", "uncropped_rows"):
        assert torch.equal(getattr(ours, name), getattr(plain, name)), name
    assert ours.damage == plain.damage
    assert min(psnr(one, two) for one, two in zip(ours.images, plain.images, strict=True)) > 45


def test_pixels_are_close_to_pillows(manifest: Manifest) -> None:
    """Up and down, flipped and not: at least 60 dB on average, which is one grey level here and there."""
    made = list(zip(batches(manifest, "device"), batches(manifest, "pillow"), strict=True))
    for ours, plain in made:
        assert_close(ours, plain)
    assert np.mean([psnr(a, b) for ours, plain in made for a, b in zip(ours.images, plain.images, strict=True)]) > 60


@pytest.mark.multi
def test_workers_hand_the_bytes_on(manifest: Manifest) -> None:
    for ours, plain in zip(batches(manifest, "device", workers=2), batches(manifest, "device"), strict=True):
        assert torch.equal(ours.images, plain.images)
        assert_close(ours, plain)


@pytest.mark.parametrize("odd", [encoded(SOURCE.convert("CMYK")), encoded(SOURCE, "PNG"), turned(6), turned(3)])
def test_odd_pictures_are_decoded_by_the_exact_path(odd: bytes) -> None:
    found = deferred(odd)
    assert isinstance(found, Image.Image) and np.array_equal(np.asarray(found), np.asarray(decode(odd)))


@pytest.mark.parametrize("data", [encoded(SOURCE), encoded(SOURCE.convert("L")), encoded(SOURCE) + bytes(9)])
def test_plain_jpegs_are_left_as_they_are(data: bytes) -> None:
    assert deferred(data) == Undecoded(data, SOURCE.height, SOURCE.width)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", encoded(SOURCE)[:-400], b"no picture", bomb(30_000)])
def test_damage_is_seen_by_the_worker(data: bytes) -> None:
    with pytest.raises(BadImage):
        deferred(data)


@pytest.mark.parametrize("inside", [False, True])
def test_damage_is_replaced_and_listed_as_ever(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    """A picture that cannot be read at all, and one whose damage only the decoder meets: header and end are whole."""
    monkeypatch.setattr(sample_reader, "PAUSES_S", (0.0,))
    manifest = Manifest.load(Path(shutil.copytree(shards, tmp_path / "copy")))
    sample = 33
    size, offset = int(manifest.sizes[sample]), int(manifest.offsets[sample])
    with open(manifest.shard_paths[int(manifest.locate(sample)[0])], "r+b") as file:
        file.seek(offset)
        file.write(without_tables(manifest.read(sample)) if inside else bytes(size))
    if inside:
        assert isinstance(deferred(manifest.read(sample)), Undecoded)
    made = list(zip(batches(manifest, "device"), batches(manifest, "pillow"), strict=True))
    for ours, plain in made:
        assert_close(ours, plain)
    damage = [one for ours, _ in made for one in ours.damage]
    assert [one.sample for one in damage] == [sample] and damage[0].key == manifest.key(sample)


def test_a_device_that_decodes_nothing_is_refused() -> None:
    device_decode.check(torch.device("cpu"))
    with pytest.raises(UserError, match="data.decoder = device: .* decodes no JPEG on cuda:99") as caught:
        device_decode.check(torch.device("cuda:99"))  # no machine has it
    assert "\n" not in str(caught.value)


def test_a_device_without_memory_is_no_damage(manifest: Manifest) -> None:
    def decode_nothing(parts: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        raise RuntimeError("CUDA out of memory")

    data = DataConfig(shards=str(manifest.folder), image_size=64, workers=0, decoder="device")
    loader = TrainLoader(manifest, data, Needs(), seed=1, global_batch=4, micro_batch=4, rank=0, world=1)
    loader._finish._decode = decode_nothing  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="out of memory"):
        next(iter(loader))


def without_tables(data: bytes) -> bytes:
    """The quantisation tables (DQT) become comments: the header can be read, and no decoder goes on behind it."""
    return data.replace(b"\xff\xdb", b"\xff\xfe")


@pytest.mark.parametrize("key", ["crop", "crops", "decode_short_side"])
def test_what_does_not_go_together_is_refused(key: str) -> None:
    values = {"crop": "padded", "crops": 2, "decode_short_side": 100}
    with pytest.raises(ValueError, match="decoder = device: only with"):
        DataConfig(shards="x", decoder="device", **{key: values[key]})


def test_the_path_is_named() -> None:
    where = "nvJPEG through" if torch.cuda.is_available() else "libjpeg-turbo through"
    assert device_decode.explain().startswith(where)
