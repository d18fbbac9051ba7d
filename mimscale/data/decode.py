"""Stored bytes -> RGB picture, by content: the name of the file does not matter (ImageNet has a PNG named .JPEG)."""

from __future__ import annotations

import io

from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 100_000_000


class BadImage(ValueError):
    """Bytes that are not a whole picture of an accepted format and size."""


def decode(data: bytes) -> Image.Image:
    """The first frame as 8-bit RGB, in stored orientation (EXIF is ignored, as torchvision's ImageFolder does).

    CMYK, grey and palette pictures are converted as Pillow does; transparency is dropped. Raises BadImage.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
            return image.convert("RGB")
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise whatever their format's parser meets
        raise BadImage(f"{type(error).__name__}: {error}") from error
