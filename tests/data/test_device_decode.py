"""Decoding in the trainer's process: on the CPU, with the code that also runs on a GPU, against Pillow."""

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
from mimscale.data.decode import BadImage, UndecodedJpeg, decode, defer_jpeg
from mimscale.data.loader import TrainLoader
from mimscale.data.manifest import Manifest
from mimscale.errors import UserError
from mimscale.types import Batch, Needs
from tests.data.test_decode import SOURCE, encoded, psnr

NEEDS = Needs(labels=True, uncropped_images=3)


def with_orientation(orientation: int) -> bytes:
    """A JPEG with an EXIF orientation, which TorchCodec would apply and training must not."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(SOURCE, exif=exif)


def decompression_bomb(side: int) -> bytes:
    """A small JPEG whose header gives a huge size; for very large ones Pillow raises an error that is no OSError."""
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
    assert ours.encoded is None and ours.images.shape == plain.images.shape and ours.images.dtype == torch.uint8
    for name in ("ids", "positions", "boxes", "flips", "labels", "uncropped", "uncropped_rows"):
        assert torch.equal(getattr(ours, name), getattr(plain, name)), name
    assert ours.damage == plain.damage
    assert min(psnr(one, two) for one, two in zip(ours.images, plain.images, strict=True)) > 45


def test_pixels_are_close_to_pillows(manifest: Manifest) -> None:
    """At least 60 dB on average: some pixels differ by one grey level."""
    made = list(zip(batches(manifest, "device"), batches(manifest, "pillow"), strict=True))
    for ours, plain in made:
        assert_close(ours, plain)
    assert np.mean([psnr(a, b) for ours, plain in made for a, b in zip(ours.images, plain.images, strict=True)]) > 60


@pytest.mark.multi
def test_workers_send_the_bytes(manifest: Manifest) -> None:
    for ours, plain in zip(batches(manifest, "device", workers=2), batches(manifest, "device"), strict=True):
        assert torch.equal(ours.images, plain.images)
        assert_close(ours, plain)


@pytest.mark.parametrize(
    "data", [encoded(SOURCE.convert("CMYK")), encoded(SOURCE, "PNG"), with_orientation(6), with_orientation(3)]
)
def test_all_but_plain_jpegs_are_decoded_in_the_worker(data: bytes) -> None:
    found = defer_jpeg(data)
    assert isinstance(found, Image.Image) and np.array_equal(np.asarray(found), np.asarray(decode(data)))


@pytest.mark.parametrize("data", [encoded(SOURCE), encoded(SOURCE.convert("L")), encoded(SOURCE) + bytes(9)])
def test_plain_jpegs_are_not_decoded_in_the_worker(data: bytes) -> None:
    assert defer_jpeg(data) == UndecodedJpeg(data, SOURCE.height, SOURCE.width)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", encoded(SOURCE)[:-400], b"no image", decompression_bomb(30_000)])
def test_damage_is_found_by_the_worker(data: bytes) -> None:
    with pytest.raises(BadImage):
        defer_jpeg(data)


@pytest.mark.parametrize("only_tables", [False, True])
def test_damage_is_replaced_and_listed_as_with_other_decoders(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only_tables: bool
) -> None:
    """An image that is damaged as a whole, and one with valid header and end, which only the device decoder refuses."""
    monkeypatch.setattr(sample_reader, "RETRY_PAUSES_S", (0.0,))
    manifest = Manifest.load(Path(shutil.copytree(shards, tmp_path / "copy")))
    sample = 33
    size, offset = int(manifest.sizes[sample]), int(manifest.offsets[sample])
    with open(manifest.shard_paths[int(manifest.locate(sample)[0])], "r+b") as file:
        file.seek(offset)
        file.write(without_tables(manifest.read(sample)) if only_tables else bytes(size))
    if only_tables:
        assert isinstance(defer_jpeg(manifest.read(sample)), UndecodedJpeg)
    made = list(zip(batches(manifest, "device"), batches(manifest, "pillow"), strict=True))
    for ours, plain in made:
        assert_close(ours, plain)
    damage = [one for ours, _ in made for one in ours.damage]
    assert [one.sample for one in damage] == [sample] and damage[0].key == manifest.key(sample)


def test_a_device_that_cannot_decode_is_refused() -> None:
    device_decode.check(torch.device("cpu"))
    with pytest.raises(UserError, match="data.decoder = device: .* decodes no JPEG on cuda:99") as caught:
        device_decode.check(torch.device("cuda:99"))  # exists on no machine
    assert "\n" not in str(caught.value)


def test_out_of_memory_is_not_damage(manifest: Manifest) -> None:
    def out_of_memory(jpegs: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        raise RuntimeError("CUDA out of memory")

    data = DataConfig(shards=str(manifest.folder), image_size=64, workers=0, decoder="device")
    loader = TrainLoader(manifest, data, Needs(), seed=1, global_batch=4, micro_batch=4, rank=0, world=1)
    loader._decode._decode = out_of_memory  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="out of memory"):
        next(iter(loader))


def without_tables(data: bytes) -> bytes:
    """The quantisation tables (DQT) become comments: the header is valid, but no decoder can decode the image."""
    return data.replace(b"\xff\xdb", b"\xff\xfe")


@pytest.mark.parametrize("key", ["crop", "crops", "decode_short_side"])
def test_incompatible_options_are_refused(key: str) -> None:
    values = {"crop": "padded", "crops": 2, "decode_short_side": 100}
    with pytest.raises(ValueError, match="decoder = device: only with"):
        DataConfig(shards="x", decoder="device", **{key: values[key]})


def test_explain_names_the_decoder() -> None:
    expected = "nvJPEG through" if torch.cuda.is_available() else "libjpeg-turbo through"
    assert device_decode.explain().startswith(expected)
