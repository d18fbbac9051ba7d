"""Encoded bytes -> RGB image. The content decides the format, not the file name (ImageNet has a PNG named .JPEG).

`data.decoder` chooses one of three decoders. `decode` uses Pillow and is the reference. `SimpleJpegDecoder` decodes
JPEGs with simplejpeg (libjpeg-turbo, the same pixels) and resizes with torch's antialiased uint8 kernels, which differ
from Pillow's by one grey level in some pixels; what simplejpeg refuses is decoded by Pillow. `defer_jpeg` leaves plain
JPEGs encoded, for device_decode.py.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features
from PIL.ExifTags import Base

from mimscale.data.to_rgb import NoRgb, to_rgb

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", *(("AVIF",) if features.check("avif") else ()))
EXTENSIONS = frozenset(  # of images
    (
        "jpg",
        "jpeg",
        "jpe",
        "jfif",
        "jif",
        "mpo",
        "png",
        "webp",
        "gif",
        "bmp",
        "tif",
        "tiff",
        "ppm",
        "pgm",
        "pnm",
        "avif",
    )
)
MAX_PIXELS = 100_000_000
JPEG_SPACES = ("YCbCr", "Gray", "RGB")  # CMYK needs Pillow's conversion
MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}


class BadImage(ValueError):
    """Bytes that are not a complete image of an accepted format and size."""


def decode(data: bytes) -> Image.Image:
    """The first frame as 8-bit RGB, in stored orientation (EXIF is ignored, as torchvision's ImageFolder does).

    See `to_rgb` for modes with other than 8 bits, transparency and CMYK. Raises BadImage.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.width, image.height)
            return to_rgb(image)
    except BadImage:
        raise
    except NoRgb as error:
        raise BadImage(str(error)) from None
    except UnidentifiedImageError:
        raise BadImage(f"not an image ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's decoders raise whatever their format's parser meets
        raise BadImage(f"{type(error).__name__}: {error}") from error


class ArrayImage:
    """uint8 [H, W, 3] with the part of Pillow's interface that crops need; `resize` runs in torch."""

    def __init__(self, array: NDArray[np.uint8]):
        self.array = array

    @property
    def height(self) -> int:
        return self.array.shape[0]

    @property
    def width(self) -> int:
        return self.array.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    def crop(self, box: tuple[int, int, int, int]) -> ArrayImage:
        """A view of (left, top, right, bottom), which must lie inside."""
        left, top, right, bottom = box
        return ArrayImage(self.array[top:bottom, left:right])

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> ArrayImage:
        """To (width, height), antialiased."""
        import torch  # here, since data_prep decodes too, and must not wait for it in each of its processes
        from torch.nn import functional as F

        planes = torch.from_numpy(self.array).permute(2, 0, 1)[None]
        small = F.interpolate(planes, (size[1], size[0]), mode=MODES[resample], antialias=True)
        return ArrayImage(small[0].permute(1, 2, 0).numpy())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.array, dtype=dtype, copy=True) if copy else np.asarray(self.array, dtype=dtype)


AnyImage = Image.Image | ArrayImage
Decoder = Callable[[bytes], Any]  # -> AnyImage; `defer_jpeg` may return an UndecodedJpeg


class SimpleJpegDecoder:
    """bytes -> ArrayImage. Raises BadImage.

    A result is valid until the next call, because all results share one buffer: with a new buffer per image a fifth of
    the decoding time would go to the kernel, which clears new pages.

    short_side: larger JPEGs are decoded at 1/2, 1/4 or 1/8 of their size (scaled DCT) as long as the short side keeps
    at least this many pixels; 0 = never, since it changes pixels.
    """

    def __init__(self, short_side: int = 0):
        import simplejpeg

        self.short_side = short_side
        self._jpeg = simplejpeg
        self._buffer = np.empty(0, np.uint8)

    def __reduce__(self) -> tuple[object, ...]:
        return SimpleJpegDecoder, (self.short_side,)

    def __call__(self, data: bytes) -> ArrayImage:
        array = self._decode_jpeg(data) if data[:2] == b"\xff\xd8" else None
        # a copy, because Pillow's array is read-only, about which torch warns in `resize`
        return ArrayImage(np.array(decode(data)) if array is None else array)

    def _decode_jpeg(self, data: bytes) -> NDArray[np.uint8] | None:
        """None if the data is not a plain JPEG or simplejpeg warns; then Pillow decides whether it is damaged."""
        try:
            height, width, space, _ = self._jpeg.decode_jpeg_header(data)
            if space not in JPEG_SPACES:
                return None
            _check_size(width, height)
            scales = [
                scale for scale in (8, 4, 2) if self.short_side and min(height, width) // scale >= self.short_side
            ]
            if scales:
                height, width = -(-height // scales[0]), -(-width // scales[0])
            if len(self._buffer) < 3 * height * width:
                self._buffer = np.empty(3 * height * width, np.uint8)
            return self._jpeg.decode_jpeg(data, min_height=height, min_width=width, buffer=self._buffer)
        except BadImage:
            raise
        except ValueError:
            return None


@dataclass(frozen=True)
class UndecodedJpeg:
    """A JPEG that the device will decode; height and width come from its header."""

    data: bytes
    height: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height


def defer_jpeg(data: bytes) -> UndecodedJpeg | Image.Image:
    """Leave a plain upright JPEG with an end marker encoded; decode everything else with `decode`. Raises BadImage."""
    if data[:2] == b"\xff\xd8" and data.rstrip(b"\0").endswith(b"\xff\xd9"):
        # an error here is ignored: `decode` below raises it again
        with suppress(Exception), Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            _check_size(image.width, image.height)
            upright = image.getexif().get(Base.Orientation, 1) == 1  # TorchCodec would rotate it
            if image.mode in ("RGB", "L") and upright:
                return UndecodedJpeg(data, image.height, image.width)
    return decode(data)


def make_decoder(name: Literal["simplejpeg", "pillow", "device"], short_side: int = 0) -> Decoder:
    """The function that workers call on the encoded bytes of an image."""
    if name == "simplejpeg":
        return SimpleJpegDecoder(short_side)
    return defer_jpeg if name == "device" else decode


def explain(name: Literal["simplejpeg", "pillow"]) -> str:
    """Which decoder this is, and why it is used."""
    if name == "simplejpeg":
        return f"simplejpeg {version('simplejpeg')} and torch's antialiased resize; Pillow for all but plain JPEGs"
    why = "chosen by data.decoder" if find_spec("simplejpeg") else "simplejpeg is not installed"
    return f"Pillow {PIL.__version__} alone, slower: {why}"


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels, more than {MAX_PIXELS:,}")
