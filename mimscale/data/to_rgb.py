"""Any mode of Pillow -> 8-bit RGB. What has no defined grey value is refused, not clipped.

Pillow's own `convert("RGB")` clips 16-bit, 32-bit and float values at 255, drops transparency, which uncovers whatever
colour lies below, and takes every CMYK JPEG for an inverted one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

BACKGROUND = (255, 255, 255)  # below transparent pixels
PLAIN = ("1", "L", "P", "RGB", "RGBX", "YCbCr", "HSV")  # Pillow's conversion has one meaning
ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
BITS_PER_SAMPLE, SAMPLE_FORMAT, PHOTOMETRIC = 258, 339, 262  # tags of TIFF
UNSIGNED, SIGNED = 1, 2
STEP = {"L;2": 85, "L;4": 17}  # of grey PNGs with 2 and 4 bits, whose pixels Pillow scales to 8


class NoRgb(ValueError):
    """An image whose values have no defined 8-bit RGB."""


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as mode RGB. Raises NoRgb.

    - 1, L, P, RGB, YCbCr: as Pillow converts them.
    - Transparency (LA, RGBA, PA, and P, L or RGB with a transparent colour): over white; opaque pixels keep their bits.
    - CMYK: as Pillow converts it; a JPEG without the Adobe marker stores ink, not its complement.
    - 16-bit and 32-bit integers: the highest 8 bits of the range of the stored type (12 bits: of 12). Negative values
      are refused, and values so small that all of them would be black.
    - float: 0 to 1 is black to white, rounded to the nearest; other values are refused.
    - LAB and others, and 8 bits with a sign: refused.
    """
    tags = getattr(image, "tag_v2", {})  # of TIFF
    if image.mode == "F":
        return _grey(_from_float(np.asarray(image), white_is_zero=tags.get(PHOTOMETRIC) == 0))
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _grey(_from_integers(image))
    if SIGNED in tags.get(SAMPLE_FORMAT, ()):  # Pillow reads them without it
        raise NoRgb("8-bit values with a sign: below 0 no grey is defined; store it as 8-bit RGB or grey")
    clear = image.info.get("transparency")
    if isinstance(clear, tuple) and (max(clear) > 255 or _stored_as(image) == "RGB;16B"):  # Pillow cuts these pixels
        raise NoRgb(f"a transparent colour of 16 bits, {clear}; store it with 8 bits or without")
    if isinstance(clear, int) and image.mode == "L":
        image.info["transparency"] = clear * STEP.get(_stored_as(image), 1)
    if image.mode in ALPHA or clear is not None:
        return _over_background(image)
    if image.mode == "CMYK":
        image.load()
        stores_ink = image.format in ("JPEG", "MPO") and "adobe" not in image.info  # Pillow has inverted it
        return (ImageChops.invert(image) if stores_ink else image).convert("RGB")
    if image.mode not in PLAIN:
        raise NoRgb(f"mode {image.mode} has no defined RGB; store it as 8-bit RGB")
    return image.convert("RGB")


def _stored_as(image: Image.Image) -> str:
    """Pillow's name for the layout of the pixels in the file, before they are loaded."""
    arguments = image.tile[0].args if getattr(image, "tile", None) else ""  # type: ignore[attr-defined]
    return str(arguments[0]) if isinstance(arguments, tuple) else str(arguments)


def _grey(values: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(values).convert("RGB")


def _over_background(image: Image.Image) -> Image.Image:
    rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    if rgba.getchannel("A").getextrema()[0] == 255:
        return rgba.convert("RGB")
    below = Image.new("RGBA", rgba.size, (*BACKGROUND, 255))
    return Image.alpha_composite(below, rgba).convert("RGB")


def _from_float(values: NDArray[np.float32], white_is_zero: bool) -> NDArray[np.uint8]:
    if not np.isfinite(values).all():
        raise NoRgb("float values that are not finite; store it with 8 bits")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        raise NoRgb(f"float values from {low:g} to {high:g}: only 0 to 1 is black to white; store it with 8 bits")
    return np.rint((1 - values if white_is_zero else values) * 255).astype(np.uint8)


def _from_integers(image: Image.Image) -> NDArray[np.uint8]:
    values, bits = np.asarray(image).astype(np.int64), 16
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        bits = int(tags.get(BITS_PER_SAMPLE, (16,))[0])
        if tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0] == SIGNED:
            bits -= 1
        elif bits == 32:
            values &= 0xFFFFFFFF  # Pillow holds them as signed
        if tags.get(PHOTOMETRIC) == 0:  # white is zero: Pillow inverts only 8 bits and fewer
            values = (1 << bits) - 1 - values
    if values.min() < 0:
        raise NoRgb(f"integer values down to {values.min():,}: below 0 no grey is defined; store it with 8 bits")
    if values.max() >> bits:
        raise NoRgb(f"integer values up to {values.max():,}, more than {bits} bits; store it with 8 bits")
    grey = (values >> (bits - 8)).astype(np.uint8)
    clear = image.info.get("transparency")  # of PNG
    if isinstance(clear, int):
        grey[values == clear] = BACKGROUND[0]
    if values.max() > 0 and grey.max() == 0:
        raise NoRgb(
            f"integer values up to {values.max():,} of {(1 << bits) - 1:,}: all would be black; store it with 8 bits"
        )
    return grey
