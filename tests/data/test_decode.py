"""Odd files that real data sets hold: ImageNet has CMYK JPEGs, a PNG named .JPEG and damaged EXIF."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mimscale.data import decode as module
from mimscale.data import noise
from mimscale.data.decode import BadImage, Fast, Picture, decode, explain
from mimscale.data.synthetic import picture
from mimscale.data.transforms import padded_crop, random_box, resized, resized_crop, squeezed

SOURCE = Image.fromarray(picture(1, 3, 96, 0, 0))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF"])
def test_lossless_formats_by_content(kind: str) -> None:
    assert np.array_equal(np.asarray(decode(encoded(SOURCE, kind))), np.asarray(SOURCE))


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB", "1", "P", "RGBA", "LA", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = "JPEG" if mode in ("L", "CMYK", "RGB") else "PNG"
    image = Image.fromarray(np.arange(6, dtype=np.uint16).reshape(2, 3)) if mode == "I;16" else SOURCE.convert(mode)
    result = decode(encoded(image, kind))
    assert result.mode == "RGB" and result.size == image.size


def test_progressive_and_trailing_bytes() -> None:
    plain = np.asarray(decode(encoded(SOURCE)))
    assert np.array_equal(np.asarray(decode(encoded(SOURCE, progressive=True))), plain)
    assert np.array_equal(np.asarray(decode(encoded(SOURCE) + bytes(100))), plain)


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(SOURCE, exif=exif.tobytes())).size == SOURCE.size


@pytest.mark.parametrize("data", [b"", b"no picture", encoded(SOURCE)[:-400], encoded(SOURCE, "PNG")[:300]])
def test_damage_is_an_error(data: bytes) -> None:
    with pytest.raises(BadImage):
        decode(data)


def test_image_bombs_are_refused_before_they_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", SOURCE.width * SOURCE.height)
    decode(encoded(SOURCE))
    monkeypatch.setattr(module, "MAX_PIXELS", SOURCE.width * SOURCE.height - 1)
    with pytest.raises(BadImage, match="pixels, more than"):
        decode(encoded(SOURCE))


def test_formats_with_an_interpreter_are_not_opened() -> None:
    with pytest.raises(BadImage):
        decode(encoded(SOURCE, "EPS"))


def psnr(one: object, two: object) -> float:
    """dB, at most 99."""
    error = (np.asarray(one).astype(float) - np.asarray(two)) ** 2
    return float(min(99.0, 10 * np.log10(255**2 / max(error.mean(), 1e-9))))


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}])
def test_the_fast_path_decodes_to_the_same_pixels(options: dict) -> None:
    for number in range(6):
        for image in (picture(number, 6, 90, 0, number), picture(number, 6, 90, 0, number)[:, :, 0]):
            data = encoded(Image.fromarray(image), **options)
            assert np.array_equal(np.asarray(Fast()(data)), np.asarray(decode(data)))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_fast_path_crops_to_nearly_the_same_pixels(interpolation) -> None:
    """One grey level here and there: at least 60 dB on average, up and down, for every kind of crop."""
    fast, found = Fast(), []
    for number in range(24):
        data = encoded(Image.fromarray(picture(number % 3, 3, 160, 0, number)), quality=90)
        plain = decode(data)
        numbers = noise.uniform(0, "test", number, n=23).tolist()
        box = random_box((plain.height, plain.width), (0.2, 1.0), (3 / 4, 4 / 3), numbers)
        for side in (64, 160):
            ours = resized_crop(fast(data), box, side, interpolation)
            assert isinstance(ours, Picture) and ours.size == (side, side)
            found.append(psnr(ours, resized_crop(plain, box, side, interpolation)))
        small = resized(fast(data), 64, interpolation)
        square = (-2, 1, 64, 64)
        found.append(psnr(padded_crop(small, square, 4), padded_crop(resized(plain, 64, interpolation), square, 4)))
        found.append(
            psnr(squeezed(small, 48, interpolation), squeezed(resized(plain, 64, interpolation), 48, interpolation))
        )
    assert np.mean(found) >= 60 and min(found) > 48


@pytest.mark.parametrize("data", [encoded(SOURCE.convert("CMYK")), encoded(SOURCE, "PNG"), encoded(SOURCE) + bytes(9)])
def test_the_fast_path_falls_back_to_pillow(data: bytes) -> None:
    assert np.array_equal(np.asarray(Fast()(data)), np.asarray(decode(data)))


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", encoded(SOURCE)[:-400], encoded(SOURCE)[:200], b"no picture"])
def test_damage_is_an_error_on_the_fast_path(data: bytes) -> None:
    with pytest.raises(BadImage):
        Fast()(data)


def test_bombs_are_refused_on_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", SOURCE.width * SOURCE.height - 1)
    with pytest.raises(BadImage, match="pixels, more than"):
        Fast()(encoded(SOURCE))


def test_a_picture_is_valid_until_the_next_call() -> None:
    fast, other = Fast(), Image.new("RGB", (200, 200), (9, 9, 9))
    kept = np.array(fast(encoded(SOURCE)))
    fast(encoded(other, quality=95))
    assert np.array_equal(np.asarray(fast(encoded(SOURCE))), kept)


def test_large_photos_may_be_decoded_small() -> None:
    """Only on request, only while the short side stays long enough, and close to a resize of the whole picture."""
    data = encoded(SOURCE.resize((1603, 1205), Image.Resampling.BICUBIC), quality=95)
    assert Fast()(data).size == (1603, 1205) and Fast(1000)(data).size == (1603, 1205)
    assert Fast(600)(data).size == (802, 603) and Fast(256)(data).size == (401, 302)
    assert psnr(squeezed(Fast(600)(data), 224, "bicubic"), squeezed(decode(data), 224, "bicubic")) > 30
    assert Fast(600)(encoded(SOURCE)).size == SOURCE.size


def test_the_path_is_named() -> None:
    assert explain("simplejpeg").startswith("simplejpeg 1.") and "chosen by data.decoder" in explain("pillow")
