"""Pixels of every mode: values written down here, not those of Pillow's own conversion."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.__main__ import main
from data_prep.images import ImageOptions, process_image
from mimscale.data.decode import BadImage, decode
from mimscale.data.jpeg import SimpleJpegDecoder
from mimscale.data.manifest import Manifest


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def array(rows: object, kind: str) -> Image.Image:
    return Image.fromarray(np.array(rows, dtype=kind))


def pixels(data: bytes) -> list[list[int]]:
    """RGB of each pixel, the same by every decoder."""
    image = decode(data)
    assert image.mode == "RGB"
    found = np.asarray(image).reshape(-1, 3)
    assert np.array_equal(np.asarray(SimpleJpegDecoder()(data)).reshape(-1, 3), found)
    return found.tolist()


def greys(data: bytes) -> list[int]:
    found = np.array(pixels(data))
    assert (found == found[:, :1]).all()
    return found[:, 0].tolist()


SIXTEEN = [[0, 255, 256], [32767, 65279, 65535]]
HIGH = [0, 0, 1, 127, 254, 255]


@pytest.mark.parametrize(("kind", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("PPM", "<u2")])
def test_16_bit_grey_is_scaled_by_its_range(kind: str, dtype: str) -> None:
    assert greys(encoded(array(SIXTEEN, dtype), kind)) == HIGH


def tiff(values: list[int], dtype: str, bits: int, sample_format: int, photometric: int = 1) -> bytes:
    """A TIFF of one row with these tags, which Pillow cannot write itself."""
    data = np.array(values, dtype=dtype).tobytes()
    tags = [(256, len(values)), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 134), (277, 1), (278, 1)]
    tags += [(279, len(data)), (339, sample_format)]
    entries = b"".join(
        tag.to_bytes(2, "little") + b"\x04\0\x01\0\0\0" + value.to_bytes(4, "little") for tag, value in tags
    )
    head = b"II*\0\x08\0\0\0" + len(tags).to_bytes(2, "little") + entries + bytes(4)
    return head + data


@pytest.mark.parametrize(
    ("values", "dtype", "bits", "sample_format", "expected"),
    [
        ([0, 1 << 24, 0x80000000, 0xFFFFFFFF], "<u4", 32, 1, [0, 1, 128, 255]),
        ([0, 1 << 23, 1 << 30, 0x7FFFFFFF], "<i4", 32, 2, [0, 1, 128, 255]),
        ([0, 128, 16384, 32767], "<i2", 16, 2, [0, 1, 128, 255]),
        ([0, 256, 32768, 65535], "<u2", 16, 1, [0, 1, 128, 255]),
    ],
)
def test_integers_of_tiff(values: list[int], dtype: str, bits: int, sample_format: int, expected: list[int]) -> None:
    assert greys(tiff(values, dtype, bits, sample_format)) == expected


def test_tiff_whose_zero_is_white() -> None:
    quarter = np.array([0, 0.25, 1], "<f4").view("<u4").tolist()
    assert greys(tiff(quarter, "<u4", 32, 3, photometric=0)) == [255, 191, 0]
    assert greys(tiff([0, 65535, 32767], "<u2", 16, 1, photometric=0)) == [255, 0, 128]


def test_grey_maps_with_other_maxima() -> None:
    data = b"P5\n4 1\n1023\n" + np.array([0, 4, 512, 1023], ">u2").tobytes()
    assert greys(data) == [0, 1, 128, 255]


def test_float_from_0_to_1() -> None:
    assert greys(encoded(array([[0, 0.25, 0.5, 1]], "float32"), "TIFF")) == [0, 64, 128, 255]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(array([[0, 254.0]], "float32"), "TIFF"), "float values from 0 to 254: only 0 to 1"),
        (encoded(array([[-0.5, 1]], "float32"), "TIFF"), "float values from -0.5"),
        (encoded(array([[0, np.nan]], "float32"), "TIFF"), "not finite"),
        (tiff([-1, 5], "<i4", 32, 2), "below 0 no grey"),
        (tiff([-32768, 5], "<i2", 16, 2), "below 0 no grey"),
        (encoded(array([[0, 255]], "int32"), "TIFF"), "all would be black"),
        (encoded(array([[0, 255]], "uint16"), "PNG"), "all would be black"),
        (encoded(Image.new("LAB", (2, 2)), "TIFF"), "mode LAB has no defined RGB"),
        (tiff([-1, 5], "i1", 8, 2), "8-bit values with a sign"),
        (tiff([0, 1], "<f8", 64, 3), "a TIFF of a kind that Pillow cannot read"),
    ],
)
def test_what_has_no_defined_grey_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        decode(data)


def test_black_stays_black() -> None:
    assert greys(encoded(array([[0, 0]], "uint16"), "PNG")) == [0, 0]
    assert greys(encoded(array([[0, 0]], "float32"), "TIFF")) == [0, 0]


def test_transparency_is_over_white() -> None:
    rgba = array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], "uint8")
    assert pixels(encoded(rgba, "PNG")) == [[10, 20, 30], [255, 255, 255], [127, 127, 127]]
    grey = array([[[10, 255], [10, 0], [0, 128]]], "uint8")
    assert greys(encoded(grey, "PNG")) == [10, 255, 127]
    opaque = array([[[1, 2, 3, 255], [4, 5, 6, 255]]], "uint8")
    assert pixels(encoded(opaque, "PNG")) == [[1, 2, 3], [4, 5, 6]]


def palette() -> Image.Image:
    image = array([[0, 1, 2]], "uint8")
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 0, 200])
    return image


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palettes_with_and_without_a_transparent_colour(kind: str) -> None:
    assert pixels(encoded(palette(), kind)) == [[9, 9, 9], [200, 0, 0], [0, 0, 200]]
    assert pixels(encoded(palette(), kind, transparency=1)) == [[9, 9, 9], [255, 255, 255], [0, 0, 200]]


def test_a_transparent_colour_of_rgb_and_grey() -> None:
    rgb = array([[[1, 2, 3], [4, 5, 6]]], "uint8")
    assert pixels(encoded(rgb, "PNG", transparency=(4, 5, 6))) == [[1, 2, 3], [255, 255, 255]]
    assert greys(encoded(array([[7, 8]], "uint8"), "PNG", transparency=7)) == [255, 8]
    assert greys(encoded(array([[7, 3000, 40000]], "uint16"), "PNG", transparency=3000)) == [0, 255, 156]
    with pytest.raises(BadImage, match="a transparent colour of 16 bits"):
        decode(encoded(rgb, "PNG", transparency=(4, 500, 6)))


def png(bits: int, colours: int, row: bytes, clear: tuple[int, ...]) -> bytes:
    """A PNG of one row of 2 pixels, which Pillow cannot write itself."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    head = (2).to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes([bits, colours, 0, 0, 0])
    parts = chunk(b"IHDR", head) + chunk(b"tRNS", b"".join(value.to_bytes(2, "big") for value in clear))
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


def test_a_transparent_grey_of_few_bits_and_a_colour_of_16_bits() -> None:
    assert greys(png(4, 0, b"\x5f", (5,))) == [255, 255] and greys(png(4, 0, b"\x5e", (14,))) == [85, 255]
    assert greys(png(2, 0, b"\x60", (1,))) == [255, 170] and greys(png(1, 0, b"\x40", (0,))) == [255, 255]
    with pytest.raises(BadImage, match="a transparent colour of 16 bits, .1, 2, 3."):
        decode(png(16, 2, bytes([0, 1, 0, 2, 0, 3, 1, 9, 2, 9, 3, 9]), (1, 2, 3)))


def test_one_bit() -> None:
    assert greys(encoded(Image.fromarray(np.array([[True, False]])), "PNG")) == [255, 0]


def test_cmyk_with_and_without_the_adobe_marker() -> None:
    """The marker says that the complement of ink is stored. Both files show the same red."""
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    adobe = encoded(red, "JPEG", quality=100)
    assert np.abs(np.array(pixels(adobe)) - (255, 0, 0)).max() <= 3
    assert np.abs(np.array(pixels(encoded(red, "TIFF"))) - (255, 0, 0)).max() <= 3
    complement = encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 255)), "JPEG", quality=100)
    start = complement.index(b"\xff\xee")
    length = int.from_bytes(complement[start + 2 : start + 4], "big")
    without = complement[:start] + complement[start + 2 + length :]
    assert b"Adobe" in adobe and b"Adobe" not in without
    assert np.abs(np.array(pixels(without)) - (255, 0, 0)).max() <= 3


def test_transcoding_keeps_the_greys_and_leaves_out_what_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    stored = process_image(encoded(array(ramp, "uint16"), "PNG"), ImageOptions(transcode=True))
    assert stored.change == "transcoded" and abs(np.asarray(decode(stored.data)).mean() - 127.5) < 1
    (tmp_path / "in" / "c").mkdir(parents=True)
    (tmp_path / "in/c/good.png").write_bytes(encoded(array(ramp, "uint16"), "PNG"))
    (tmp_path / "in/c/unit.tif").write_bytes(encoded(array(ramp / 65535, "float32"), "TIFF"))
    (tmp_path / "in/c/wide.tif").write_bytes(encoded(array(ramp, "float32"), "TIFF"))
    assert main(["folder", str(tmp_path / "in"), str(tmp_path / "out"), "--transcode"]) == 0
    assert "left out: c/wide: float values from 0 to 65535" in capsys.readouterr().err
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.samples == 2 and list(manifest.file.left_out) == ["c/wide"]
    assert all(abs(np.asarray(decode(manifest.read(n))).mean() - 127.5) < 1 for n in range(2))
