"""What becomes of one picture on its way into a shard: its bytes as they are, unless asked otherwise."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import PIL
from PIL import Image, features

from mimscale.data.decode import FORMATS, BadImage, decode

MAX_BYTES = 1 << 28  # of one picture
SIGNATURES = {  # extension -> start of the file; "." = any byte
    "jpg": (b"\xff\xd8\xff",),
    "png": (b"\x89PNG\r\n\x1a\n",),
    "webp": (b"RIFF....WEBP",),
    "gif": (b"GIF8",),
    "bmp": (b"BM",),
    "tif": (b"II*\0", b"MM\0*"),
    "ppm": (b"P2", b"P3", b"P5", b"P6"),
}
SIGNATURE_BYTES = 12


@dataclass(frozen=True)
class Pictures:
    """How pictures are stored.

    check: decode each one, and leave out what cannot be decoded.
    transcode: whatever is not an RGB or grey JPEG (CMYK, a PNG named .JPEG) becomes an RGB JPEG.
    short_side: larger pictures are resized to it, in pixels; 0 = off.
    quality: of the JPEGs that these two make.
    """

    check: bool = True
    transcode: bool = False
    short_side: int = 0
    quality: int = 95

    @property
    def changing(self) -> bool:
        return self.transcode or self.short_side > 0

    def options(self) -> dict[str, Any]:
        """For plan and manifest. What changes pixels also names who does it: other releases make other bytes."""
        jpeg = f"Pillow {PIL.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}"
        return {**asdict(self), "encoder": jpeg if self.changing else None}


class Stored(NamedTuple):
    """extension: what the bytes are. change: "", "transcoded" or "resized"."""

    extension: str
    data: bytes
    change: str


def sniff(start: bytes) -> str | None:
    """The extension that a file's first bytes call for; None if it is no picture that the loader decodes."""
    for extension, signatures in SIGNATURES.items():
        for signature in signatures:
            if len(start) >= len(signature) and all(
                a == b or b == ord(".") for a, b in zip(start, signature, strict=False)
            ):
                return extension
    return None


def stored(data: bytes, how: Pictures) -> Stored:
    """Raises BadImage for what is to be left out."""
    extension = sniff(data[:SIGNATURE_BYTES])
    if extension is None:
        raise BadImage("not a picture")
    if len(data) > MAX_BYTES:
        raise BadImage(f"{len(data):,} bytes, more than {MAX_BYTES:,}")
    change = _wanted_change(data, how) if how.changing else ""
    if not change:
        if how.check:
            decode(data)
        return Stored(extension, data, "")
    image = decode(data)
    if change == "resized":
        scale = how.short_side / min(image.size)
        size = [max(how.short_side, round(side * scale)) for side in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=how.quality)
    return Stored("jpg", buffer.getvalue(), change)


def _wanted_change(data: bytes, how: Pictures) -> str:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # reads the header only
            if how.short_side and min(image.size) > how.short_side:
                return "resized"
            plain = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
            return "transcoded" if how.transcode and not plain else ""
    except Exception as error:  # see decode
        raise BadImage(f"{type(error).__name__}: {error}") from error
