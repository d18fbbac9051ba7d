"""How one image is stored in a shard: unchanged, or transcoded or resized if the options ask for it."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import PIL
from PIL import Image, features

from data_prep.file_kinds import START_BYTES, begins, kind_of
from mimscale.data.decode import FORMATS, BadImage, bad_image, decode

MAX_BYTES = 1 << 28  # of one encoded image
SIGNATURES = {  # extension -> first bytes of the file; "." = any byte
    "jpg": (b"\xff\xd8\xff",),
    "png": (b"\x89PNG\r\n\x1a\n",),
    "webp": (b"RIFF....WEBP",),
    "gif": (b"GIF8",),
    "bmp": (b"BM",),
    "tif": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "ppm": (b"P2", b"P3", b"P5", b"P6"),
    "avif": (b"....ftypavif", b"....ftypavis"),
}
SIGNATURE_BYTES = START_BYTES
AVIF = features.check("avif")


@dataclass(frozen=True)
class ImageOptions:
    """How images are stored.

    check: decode each image, and leave out those that cannot be decoded.
    transcode: all but RGB and grey JPEGs (CMYK, a PNG named .JPEG) become RGB JPEGs.
    short_side: images with a longer short side are resized to this many pixels; 0 = off.
    quality: of the JPEGs that these two options write.
    """

    check: bool = True
    transcode: bool = False
    short_side: int = 0
    quality: int = 95

    @property
    def may_encode(self) -> bool:
        """Whether an image may be encoded again."""
        return self.transcode or self.short_side > 0

    def options(self) -> dict[str, Any]:
        """For plan and manifest. With the versions of the encoder if it is used: other versions write other bytes."""
        jpeg = f"Pillow {PIL.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}"
        return {**asdict(self), "encoder": jpeg if self.may_encode else None}


class StoredImage(NamedTuple):
    """extension: format of the bytes. change: "", "transcoded" or "resized"."""

    extension: str
    data: bytes
    change: str


def sniff(start: bytes) -> str | None:
    """The extension that fits the first bytes of a file; None if it is not an image that the loader decodes."""
    kind = next((name for name, signatures in SIGNATURES.items() if begins(start, signatures)), None)
    kind = "avif" if kind is None and _is_avif(start) else kind
    return None if kind == "avif" and not AVIF else kind


def describe_content(start: bytes) -> str:
    """Why a file with these first bytes is no image for the loader."""
    if not start:
        return "not an image: it is empty"
    found = "AVIF, which this Pillow cannot read" if _is_avif(start) and not AVIF else kind_of(start)
    return "not an image" if found is None else f"not an image that is read: {found}"


def _is_avif(start: bytes) -> bool:
    """Also of a HEIF container whose list of compatible brands has AVIF."""
    if begins(start, SIGNATURES["avif"]):
        return True
    brands = start[16 : min(len(start), int.from_bytes(start[:4], "big"))]
    return begins(start, (b"....ftypmif1", b"....ftypmsf1")) and b"avif" in brands


def process_image(data: bytes, options: ImageOptions) -> StoredImage:
    """The bytes to store. Raises BadImage for an image that is to be left out."""
    extension = sniff(data[:SIGNATURE_BYTES])
    if extension is None:
        raise BadImage(describe_content(data[:SIGNATURE_BYTES]))
    if len(data) > MAX_BYTES:
        raise BadImage(f"{len(data):,} bytes, more than {MAX_BYTES:,}")
    change = _needed_change(data, options) if options.may_encode else ""
    if not change:
        if options.check:
            decode(data)
        return StoredImage(extension, data, "")
    image = decode(data)
    if change == "resized":
        scale = options.short_side / min(image.size)
        size = [max(options.short_side, round(side * scale)) for side in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=options.quality)
    return StoredImage("jpg", buffer.getvalue(), change)


def _needed_change(data: bytes, options: ImageOptions) -> str:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # reads the header only
            if options.short_side and min(image.size) > options.short_side:
                return "resized"
            plain = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
            return "transcoded" if options.transcode and not plain else ""
    except Exception as error:  # see decode
        raise bad_image(error, data) from error
