"""Encoded bytes -> RGB image. The content decides the format, not the file name (ImageNet has a PNG named .JPEG).

`data.decoder` chooses one of two decoders. `decode` uses Pillow and is the reference. `jpeg.SimpleJpegDecoder` decodes
JPEGs with simplejpeg (libjpeg-turbo, the same pixels) and resizes with torch's antialiased uint8 kernels, which differ
from Pillow's by one grey level in some pixels; what simplejpeg refuses is decoded by Pillow.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features

from mimscale.data.to_rgb import NoRgb, to_rgb
from mimscale.errors import UserError, warn

if TYPE_CHECKING:  # data_prep decodes too, and needs no configuration
    from mimscale.data.config import DataConfig


def max_pixels(setting: str | None) -> int:
    """The largest image that is decoded. setting: of the user; Pillow's own, lower limit is raised to it."""
    if setting is None:
        return 100_000_000
    if not setting.isdecimal() or int(setting) < 1:
        raise UserError(f"MIMSCALE_MAX_PIXELS = '{setting}' must be a whole number above 0")
    Image.MAX_IMAGE_PIXELS = int(setting)
    return int(setting)


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
try:
    MAX_PIXELS = max_pixels(os.environ.get("MIMSCALE_MAX_PIXELS"))
except UserError as error:  # nothing of a command runs yet that could print it
    warn(str(error))
    sys.exit(2)
MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}


class BadImage(ValueError):
    """Bytes that are not a complete image of an accepted format and size."""


def decode(data: bytes, wanted: object = None) -> Image.Image:
    """The first frame as 8-bit RGB, in stored orientation (EXIF is ignored, as torchvision's ImageFolder does).

    wanted: ignored, the whole image is decoded. See `to_rgb` for modes with other than 8 bits, transparency and CMYK.
    Raises BadImage.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(image.width, image.height)
            return to_rgb(image)
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise whatever their format's parser meets
        raise bad_image(error, data) from error


def bad_image(error: Exception, data: bytes) -> BadImage:
    """What to raise for encoded bytes with which Pillow raised `error`; the reason is the same in every process."""
    if isinstance(error, NoRgb):
        return BadImage(str(error))
    if isinstance(error, Image.DecompressionBombError):
        return BadImage(f"more than {MAX_PIXELS:,} pixels; see MIMSCALE_MAX_PIXELS")
    if not isinstance(error, UnidentifiedImageError):
        return BadImage(f"{type(error).__name__}: {error}")
    if data[:4] in (b"II*\0", b"MM\0*"):
        return BadImage("a TIFF of a kind that Pillow cannot read; store it as 8-bit RGB or grey")
    return BadImage(f"not an image ({', '.join(FORMATS)})")


class Part(NamedTuple):
    """What is needed of an image. bottom: nothing below this row.  side: shorter side of the smallest crop, pixels."""

    bottom: int
    side: int


Size = tuple[int, int]  # height, width
Wanted = Callable[[Size], Part]


class ArrayImage:
    """The part of Pillow's interface that crops need; `resize` runs in torch.

    array: uint8 [rows, W, 3], the upper rows, at least those that were wanted, or all at a fraction 1 / `fraction` of
    the stored size.  size: (width, height) of the whole stored image.
    """

    def __init__(self, array: NDArray[np.uint8], size: tuple[int, int] | None = None, fraction: int = 1):
        self.array, self.fraction = array, fraction
        self.size = (array.shape[1], array.shape[0]) if size is None else size

    @property
    def height(self) -> int:
        return self.size[1]

    @property
    def width(self) -> int:
        return self.size[0]

    def crop(self, box: tuple[int, int, int, int]) -> ArrayImage:
        """A view of (left, top, right, bottom), which must lie inside; at a fraction to the nearest pixel there."""
        left, top, right, bottom = (round(edge / self.fraction) for edge in box)
        assert bottom <= len(self.array), "rows that were not wanted"
        return ArrayImage(self.array[top:bottom, left:right])

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> ArrayImage:
        """To (width, height), antialiased."""
        import torch  # here, since data_prep decodes too, and must not wait for it in each of its processes
        from torch.nn import functional as F

        assert len(self.array) >= self.height // self.fraction, "rows that were not wanted"
        # strides of a batch in channels_last, which the result keeps; another order costs a third of the time more
        image_1CHW = torch.from_numpy(self.array)[None].permute(0, 3, 1, 2)
        small = F.interpolate(image_1CHW, (size[1], size[0]), mode=MODES[resample], antialias=True)
        return ArrayImage(small[0].permute(1, 2, 0).numpy())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.array, dtype=dtype, copy=True) if copy else np.asarray(self.array, dtype=dtype)


AnyImage = Image.Image | ArrayImage


class Decoder(Protocol):
    def __call__(self, data: bytes, wanted: Wanted | None = None, /) -> AnyImage:
        """wanted: called with the stored size if less than the whole image can be decoded; None: all is wanted.

        Raises BadImage.
        """


def make_decoder(data: DataConfig) -> Decoder:
    """The function that workers call on the encoded bytes of an image."""
    if data.decoder == "pillow":
        return decode
    from mimscale.data.jpeg import SimpleJpegDecoder

    return SimpleJpegDecoder(data.decode_short_side, data.image_size if data.reduced_decode else 0)


def explain(name: Literal["simplejpeg", "pillow"]) -> str:
    """Which decoder this is, and why it is used."""
    if name == "simplejpeg":
        return f"simplejpeg {version('simplejpeg')} and torch's antialiased resize; Pillow for all but plain JPEGs"
    why = "chosen by data.decoder" if find_spec("simplejpeg") else "simplejpeg is not installed"
    return f"Pillow {PIL.__version__} alone, slower: {why}"


def check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels, more than {MAX_PIXELS:,}; see MIMSCALE_MAX_PIXELS")
