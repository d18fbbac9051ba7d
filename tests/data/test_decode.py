"""Unusual files of real data sets: ImageNet has CMYK JPEGs, a PNG named .JPEG and damaged EXIF data."""

from __future__ import annotations

import io
from functools import partial

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from mimscale.data import decode as module
from mimscale.data import jpeg, noise
from mimscale.data.decode import ArrayImage, BadImage, Part, decode, explain
from mimscale.data.jpeg import SimpleJpegDecoder
from mimscale.data.synthetic import synthetic_image
from mimscale.data.transforms import (
    padded_crop,
    random_resized_crop_box,
    resized_crop,
    resized_short_side,
    resized_to_square,
)
from mimscale.errors import UserError

SOURCE = Image.fromarray(synthetic_image(1, 3, 96, 0, 0))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF"])
def test_lossless_formats_by_content(kind: str) -> None:
    assert np.array_equal(np.asarray(decode(encoded(SOURCE, kind))), np.asarray(SOURCE))


def test_progressive_jpegs_and_trailing_bytes() -> None:
    plain = np.asarray(decode(encoded(SOURCE)))
    assert np.array_equal(np.asarray(decode(encoded(SOURCE, progressive=True))), plain)
    assert np.array_equal(np.asarray(decode(encoded(SOURCE) + bytes(100))), plain)


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(SOURCE, exif=exif.tobytes())).size == SOURCE.size


@pytest.mark.parametrize("data", [b"", b"no image", encoded(SOURCE)[:-400], encoded(SOURCE, "PNG")[:300]])
def test_damage_is_an_error(data: bytes) -> None:
    with pytest.raises(BadImage):
        decode(data)


def test_decompression_bombs_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", SOURCE.width * SOURCE.height)
    decode(encoded(SOURCE))
    monkeypatch.setattr(module, "MAX_PIXELS", SOURCE.width * SOURCE.height - 1)
    with pytest.raises(BadImage, match="pixels, more than"):
        decode(encoded(SOURCE))


def test_postscript_is_not_opened() -> None:
    with pytest.raises(BadImage):
        decode(encoded(SOURCE, "EPS"))


def psnr(one: object, two: object) -> float:
    """dB, at most 99."""
    error = (np.asarray(one).astype(float) - np.asarray(two)) ** 2
    return float(min(99.0, 10 * np.log10(255**2 / max(error.mean(), 1e-9))))


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}])
def test_simplejpeg_decodes_to_the_same_pixels(options: dict) -> None:
    for number in range(6):
        for image in (synthetic_image(number, 6, 90, 0, number), synthetic_image(number, 6, 90, 0, number)[:, :, 0]):
            data = encoded(Image.fromarray(image), **options)
            assert np.array_equal(np.asarray(SimpleJpegDecoder()(data)), np.asarray(decode(data)))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_simplejpeg_crops_to_nearly_the_same_pixels(interpolation) -> None:
    """At least 60 dB on average (some pixels differ by a grey level), up and down, for every kind of crop."""
    decoder, found = SimpleJpegDecoder(), []
    for number in range(24):
        data = encoded(Image.fromarray(synthetic_image(number % 3, 3, 160, 0, number)), quality=90)
        plain = decode(data)
        numbers = noise.uniform(0, "test", number, n=23).tolist()
        box = random_resized_crop_box((plain.height, plain.width), (0.2, 1.0), (3 / 4, 4 / 3), numbers)
        for side in (64, 160):
            ours = resized_crop(decoder(data), box, side, interpolation)
            assert isinstance(ours, ArrayImage) and ours.size == (side, side)
            found.append(psnr(ours, resized_crop(plain, box, side, interpolation)))
        small = resized_short_side(decoder(data), 64, interpolation)
        square = (-2, 1, 64, 64)
        found.append(
            psnr(padded_crop(small, square, 4), padded_crop(resized_short_side(plain, 64, interpolation), square, 4))
        )
        found.append(
            psnr(
                resized_to_square(small, 48, interpolation),
                resized_to_square(resized_short_side(plain, 64, interpolation), 48, interpolation),
            )
        )
    assert np.mean(found) >= 60 and min(found) > 48


@pytest.mark.parametrize("data", [encoded(SOURCE.convert("CMYK")), encoded(SOURCE, "PNG"), encoded(SOURCE) + bytes(9)])
def test_simplejpeg_falls_back_to_pillow(data: bytes) -> None:
    image = SimpleJpegDecoder()(data)
    assert np.array_equal(np.asarray(image), np.asarray(decode(data)))
    assert image.array.flags.writeable  # torch warns of arrays that are not


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", encoded(SOURCE)[:-400], encoded(SOURCE)[:200], b"no image"])
def test_damage_is_an_error_with_simplejpeg(data: bytes) -> None:
    with pytest.raises(BadImage):
        SimpleJpegDecoder()(data)


def test_decompression_bombs_are_refused_with_simplejpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", SOURCE.width * SOURCE.height - 1)
    with pytest.raises(BadImage, match="pixels, more than"):
        SimpleJpegDecoder()(encoded(SOURCE))


def test_results_share_a_buffer() -> None:
    decoder, other = SimpleJpegDecoder(), Image.new("RGB", (200, 200), (9, 9, 9))
    copied = np.array(decoder(encoded(SOURCE)))
    decoder(encoded(other, quality=95))
    assert np.array_equal(np.asarray(decoder(encoded(SOURCE))), copied)


@pytest.mark.parametrize(
    "options",
    [{"colorsubsampling": mode} for mode in ("444", "422", "420", "440", "411", "Gray")],
    ids=lambda options: str(options["colorsubsampling"]),
)
def test_rows_below_a_crop_are_not_decoded(options: dict) -> None:
    """The others are equal to the bit, at every position of the lowest row in a block of pixels."""
    jpeg.can_stop_early.cache_clear()
    assert jpeg.can_stop_early()
    image = np.asarray(SOURCE.resize((131, 157), Image.Resampling.BICUBIC))
    grey = options["colorsubsampling"] == "Gray"
    data = simplejpeg.encode_jpeg(
        np.ascontiguousarray(image[..., :1] if grey else image), 92, "Gray" if grey else "RGB", **options
    )
    whole, decoder = np.array(decode(data)), SimpleJpegDecoder()
    for bottom in range(1, 158, 3):
        decoder._buffer.fill(77)  # what a row that is not decoded would show
        found = decoder(data, partial(part, bottom, 40))
        assert np.array_equal(found.array[:bottom], whole[:bottom]) and found.size == (131, 157)
        saved = 157 - bottom - jpeg.ROWS_AHEAD >= jpeg.LEAST_ROWS_SAVED
        assert len(found.array) == (bottom + jpeg.ROWS_AHEAD if saved else 157)
    with pytest.raises(AssertionError, match="not wanted"):
        decoder(data, lambda size: Part(50, 40)).crop((0, 20, 30, 60))


def part(bottom: int, side: int, size: tuple[int, int]) -> Part:
    return Part(bottom, side)


def restarts(image: Image.Image) -> bytes:
    return encoded(image, restart_marker_rows=1)


@pytest.mark.parametrize("make", [restarts, lambda image: encoded(image, progressive=True), encoded])
def test_other_jpegs_give_the_same_rows(make) -> None:
    """With markers between the rows; in several passes, which is decoded as a whole; with bytes behind the end."""
    data = make(SOURCE) + bytes(make is encoded)
    whole = np.asarray(decode(data))
    for bottom in (5, 33, 64):
        rows = SimpleJpegDecoder()(data, partial(part, bottom, 5)).array
        assert np.array_equal(rows[:bottom], whole[:bottom])


def test_a_truncated_jpeg_is_damage_wherever_the_crop_is() -> None:
    data = encoded(SOURCE)
    for cut in (data[:-2], data[:-200], data[: len(data) // 2], data[:-100] + b"\xff\xda" + bytes(98)):
        with pytest.raises(BadImage):
            SimpleJpegDecoder()(cut, lambda size: Part(20, 20))


def test_a_reduced_decode_depends_on_the_crop() -> None:
    """At 1/2, 1/4 or 1/8 if the shorter side of the crop allows it; the crops are close to those of the whole image."""
    data, decoder = encoded(SOURCE.resize((1603, 1205), Image.Resampling.BICUBIC), quality=95), SimpleJpegDecoder(0, 64)
    whole = decode(data)
    for side, fraction in ((127, 1), (128, 2), (256, 4), (700, 8)):
        box = (33, 57, side, side + 20)
        image = decoder(data, partial(part, 33 + side, side))
        assert image.fraction == fraction and image.size == whole.size and len(image.array) < 1205 / fraction
        ours = resized_crop(image, box, 64, "bicubic")
        assert psnr(ours, resized_crop(whole, box, 64, "bicubic")) > 30
    assert psnr(resized_to_square(decoder(data), 64, "bicubic"), resized_to_square(whole, 64, "bicubic")) > 30


def test_large_jpegs_may_be_decoded_at_a_fraction_of_their_size() -> None:
    """Only on request, only while the short side stays long enough, and close to a resize of the full-size image."""
    data = encoded(SOURCE.resize((1603, 1205), Image.Resampling.BICUBIC), quality=95)
    assert SimpleJpegDecoder()(data).size == (1603, 1205) and SimpleJpegDecoder(1000)(data).size == (1603, 1205)
    assert SimpleJpegDecoder(600)(data).size == (802, 603) and SimpleJpegDecoder(256)(data).size == (401, 302)
    assert (
        psnr(
            resized_to_square(SimpleJpegDecoder(600)(data), 224, "bicubic"),
            resized_to_square(decode(data), 224, "bicubic"),
        )
        > 30
    )
    assert SimpleJpegDecoder(600)(encoded(SOURCE)).size == SOURCE.size


def test_explain_names_the_decoder() -> None:
    assert explain("simplejpeg").startswith("simplejpeg 1.") and "chosen by data.decoder" in explain("pillow")


def test_the_pixel_limit_is_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    assert module.max_pixels(None) == 100_000_000
    assert module.max_pixels("300000000") == Image.MAX_IMAGE_PIXELS == 300_000_000
    for setting in ("", "0", "1e9", "-5", "many"):
        with pytest.raises(UserError, match="MIMSCALE_MAX_PIXELS"):
            module.max_pixels(setting)
