"""How one image is stored in a shard: unchanged, or transcoded or resized if the options ask for it."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import PIL
from PIL import Image, features

from mimscale.data.decode import FORMATS, BadImage, decode

MAX_BYTES = 1 << 28  # of one encoded image
SIGNATURES = {  # extension -> first bytes of the file; "." = any byte
    "jpg": (b"\xff\xd8\xff",),
    "png": (b"\x89PNG\r\n\x1a\n",),
    "webp": (b"RIFF....WEBP",),
    "gif": (b"GIF8",),
    "bmp": (b"BM",),
    "tif": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "ppm": (b"P2", b"P3", b"P5", b"P6"),
    **({"avif": (b"....ftypavif", b"....ftypavis")} if features.check("avif") else {}),
}
OTHER_FORMATS = {  # that are named instead of read
    "AVIF, which this Pillow cannot read": (b"....ftypavif", b"....ftypavis"),
    "HEIC": tuple(b"....ftyp" + brand for brand in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")),
    "JPEG XL": (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
    "PDF": (b"%PDF-",),
    "a page of HTML": (b"<html", b"<!DOCTYPE", b"<!doctype", b"<HTML"),
}
SIGNATURE_BYTES = 12


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
    return next((name for name, signatures in SIGNATURES.items() if _begins(start, signatures)), None)


def describe_content(start: bytes) -> str:
    """Why a file with these first bytes is no image for the loader."""
    found = next((name for name, signatures in OTHER_FORMATS.items() if _begins(start, signatures)), None)
    if not start:
        return "not an image: it is empty"
    return "not an image" if found is None else f"not an image that is read: {found}"


def _begins(start: bytes, signatures: tuple[bytes, ...]) -> bool:
    return any(
        len(start) >= len(signature) and all(a == b or b == ord(".") for a, b in zip(start, signature, strict=False))
        for signature in signatures
    )


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
        raise BadImage(f"{type(error).__name__}: {error}") from error
