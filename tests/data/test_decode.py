"""Odd files that real data sets hold: ImageNet has CMYK JPEGs, a PNG named .JPEG and damaged EXIF."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mimscale.data import decode as module
from mimscale.data.decode import BadImage, decode
from mimscale.data.synthetic import picture

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
