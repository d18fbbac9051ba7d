"""Stored bytes -> RGB picture, by content: the name of the file does not matter (ImageNet has a PNG named .JPEG).

Paths, chosen by `data.decoder`. Pillow is the reference. `Fast` decodes JPEGs with simplejpeg (libjpeg-turbo, the
same pixels) and resizes with torch's antialiased uint8 kernels, which differ from Pillow's by one grey level in some
pixels; whatever simplejpeg refuses it hands to Pillow's decoder. `deferred` leaves plain JPEGs to on_device.py.
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
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
EXTENSIONS = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm"}  # of members that are pictures
MAX_PIXELS = 100_000_000
JPEG_SPACES = ("YCbCr", "Gray", "RGB")  # CMYK needs Pillow's conversion
MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}


class BadImage(ValueError):
    """Bytes that are not a whole picture of an accepted format and size."""


def decode(data: bytes) -> Image.Image:
    """The first frame as 8-bit RGB, in stored orientation (EXIF is ignored, as torchvision's ImageFolder does).

    CMYK, grey and palette pictures are converted as Pillow does; transparency is dropped. Raises BadImage.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.width, image.height)
            return image.convert("RGB")
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"not a picture ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's decoders raise whatever their format's parser meets
        raise BadImage(f"{type(error).__name__}: {error}") from error


class Picture:
    """uint8 [H, W, 3] with the part of Pillow's interface that crops need; resizes in torch."""

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

    def crop(self, box: tuple[int, int, int, int]) -> Picture:
        """A view of (left, top, right, bottom), which must lie inside."""
        left, top, right, bottom = box
        return Picture(self.array[top:bottom, left:right])

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> Picture:
        """To (width, height), antialiased."""
        import torch  # here, since data_prep decodes too, and must not wait for it in each of its processes
        from torch.nn import functional as F

        planes = torch.from_numpy(self.array).permute(2, 0, 1)[None]
        small = F.interpolate(planes, (size[1], size[0]), mode=MODES[resample], antialias=True)
        return Picture(small[0].permute(1, 2, 0).numpy())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.array, dtype=dtype, copy=True) if copy else np.asarray(self.array, dtype=dtype)


AnyPicture = Image.Image | Picture
Decoder = Callable[[bytes], Any]  # AnyPicture; or Undecoded, from `deferred`


class Fast:
    """bytes -> Picture. A picture is valid until the next call: all share one buffer, or every decode would first wait
    for the kernel to clear new pages, a fifth of its time. Raises BadImage.

    short_side: larger JPEGs are decoded at 1/2, 1/4 or 1/8 (by their DCT) as long as their short side stays at least
    this, in pixels; 0 = never, since it changes pixels.
    """

    def __init__(self, short_side: int = 0):
        import simplejpeg

        self.short_side = short_side
        self._jpeg = simplejpeg
        self._buffer = np.empty(0, np.uint8)

    def __reduce__(self) -> tuple[object, ...]:
        return Fast, (self.short_side,)

    def __call__(self, data: bytes) -> Picture:
        array = self._simplejpeg(data) if data[:2] == b"\xff\xd8" else None
        return Picture(np.asarray(decode(data)) if array is None else array)

    def _simplejpeg(self, data: bytes) -> NDArray[np.uint8] | None:
        """None for what is not a plain JPEG, or gives a warning: whether that is damage is for Pillow to say."""
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
class Undecoded:
    """A JPEG that only the device decodes, with the size that its header tells."""

    data: bytes
    height: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height


def deferred(data: bytes) -> Undecoded | Image.Image:
    """A plain upright JPEG that has its end is left as it is; all else goes through `decode`. Raises BadImage."""
    if data[:2] == b"\xff\xd8" and data.rstrip(b"\0").endswith(b"\xff\xd9"):
        # what is wrong with it is for `decode` to say
        with suppress(Exception), Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            _check_size(image.width, image.height)
            upright = image.getexif().get(Base.Orientation, 1) == 1  # TorchCodec would turn it
            if image.mode in ("RGB", "L") and upright:
                return Undecoded(data, image.height, image.width)
    return decode(data)


def decoder(name: Literal["simplejpeg", "pillow", "device"], short_side: int = 0) -> Decoder:
    """What workers do with stored bytes."""
    if name == "simplejpeg":
        return Fast(short_side)
    return deferred if name == "device" else decode


def explain(name: Literal["simplejpeg", "pillow"]) -> str:
    """Which path this is, and why it may have been chosen."""
    if name == "simplejpeg":
        return f"simplejpeg {version('simplejpeg')} and torch's antialiased resize; Pillow for what is no plain JPEG"
    why = "chosen by data.decoder" if find_spec("simplejpeg") else "simplejpeg is not installed"
    return f"Pillow {PIL.__version__} alone, slower: {why}"


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels, more than {MAX_PIXELS:,}")
