"""JPEG bytes -> pixels with simplejpeg (libjpeg-turbo), and no more of them than a crop needs.

Rows below the crop are not decoded, nor parsed: the height in a copy of the header is lowered to the crop's lowest row
and two more, since the upsampling of colours reads one row of colours ahead. The pixels above are those of a whole
decode, which a test asserts for every kind of subsampling. libjpeg-turbo then reports the bytes that are left over as
its first warning. If it reports anything else, or the data does not end as a JPEG must, the whole image is decoded.
What lies above the crop cannot be skipped: a JPEG is one bit stream from its start.
"""

from __future__ import annotations

import re
import struct
from functools import lru_cache

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from mimscale.data.decode import ArrayImage, BadImage, Part, Wanted, check_size, decode

SPACES = ("YCbCr", "Gray", "RGB")  # CMYK needs Pillow's conversion
ROWS_AHEAD = 2
LEAST_ROWS_SAVED = 16  # a copy of the data must cost less than the decoding of the rows that it saves
SEQUENTIAL = (0xC0, 0xC1)  # start-of-frame markers of JPEGs whose rows follow each other in the data (ITU T.81, B.1)
SCAN, NO_LENGTH = 0xDA, (0x01, *range(0xD0, 0xD9))
# the marker of the end, or one of those that may stand between rows
LEFT_OVER = re.compile(r"Corrupt JPEG data: \d+ extraneous bytes before marker 0xd[0-79]$")


class SimpleJpegDecoder:
    """bytes -> ArrayImage. Raises BadImage.

    A result is valid until the next call, because all results share one buffer: with a new buffer per image a fifth of
    the decoding time would go to the kernel, which clears new pages.

    short_side: larger JPEGs are decoded at 1/2, 1/4 or 1/8 of their size (scaled DCT) as long as the short side keeps
    at least this many pixels. reduced_side: the same, as long as the shorter side of the smallest crop keeps at least
    this many. 0 = never; both change pixels.
    """

    def __init__(self, short_side: int = 0, reduced_side: int = 0):
        self.short_side, self.reduced_side = short_side, reduced_side
        self._buffer = np.empty(0, np.uint8)

    def __reduce__(self) -> tuple[object, ...]:
        return SimpleJpegDecoder, (self.short_side, self.reduced_side)

    def __call__(self, data: bytes, wanted: Wanted | None = None) -> ArrayImage:
        image = self._decode(data, wanted) if data[:2] == b"\xff\xd8" else None
        # a copy, because Pillow's array is read-only, about which torch warns in `resize`
        return ArrayImage(np.array(decode(data))) if image is None else image

    def _decode(self, data: bytes, wanted: Wanted | None) -> ArrayImage | None:
        """None if the data is not a plain JPEG or simplejpeg warns; then Pillow decides whether it is damaged."""
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
            if space not in SPACES:
                return None
            check_size(width, height)
            if self.short_side:
                fraction = _fraction(min(height, width), self.short_side)
                size = -(-width // fraction), -(-height // fraction)  # crops are drawn in the smaller image
                return ArrayImage(self._pixels(data, height, width, fraction), size)
            part = Part(height, min(height, width)) if wanted is None else wanted((height, width))
            fraction = _fraction(part.side, self.reduced_side)
            rows = self._upper_rows(data, height, width, part.bottom, fraction)
            if rows is None:
                rows = self._pixels(data, height, width, fraction)
            return ArrayImage(rows, (width, height), fraction)
        except BadImage:
            raise
        except ValueError:
            return None

    def _pixels(self, data: bytes, height: int, width: int, fraction: int) -> NDArray[np.uint8]:
        """uint8 [H / fraction, W / fraction, 3], rounded up. Raises ValueError."""
        buffer, height, width = self._room(height, width, fraction)
        return simplejpeg.decode_jpeg(data, min_height=height, min_width=width, buffer=buffer)

    def _upper_rows(self, data: bytes, height: int, width: int, bottom: int, fraction: int) -> NDArray[np.uint8] | None:
        """The rows above `bottom`, and perhaps some more, or None if the image must be decoded as a whole."""
        rows = bottom + ROWS_AHEAD * fraction
        if rows + LEAST_ROWS_SAVED > height or not can_stop_early():
            return None
        cut = with_height(data, rows)
        if cut is None:
            return None
        buffer, rows, width = self._room(rows, width, fraction)
        try:
            return simplejpeg.decode_jpeg(cut, min_height=rows, min_width=width, buffer=buffer)
        except ValueError as error:
            if not LEFT_OVER.match(str(error)):
                return None
        return buffer[: 3 * rows * width].reshape(rows, width, 3)

    def _room(self, height: int, width: int, fraction: int) -> tuple[NDArray[np.uint8], int, int]:
        """(a buffer that is large enough, height and width of the image at a fraction of its size)."""
        height, width = -(-height // fraction), -(-width // fraction)
        if len(self._buffer) < 3 * height * width:
            self._buffer = np.empty(3 * height * width, np.uint8)
        return self._buffer, height, width


def with_height(data: bytes, height: int) -> bytes | None:
    """A JPEG with another height in its header. None if its rows do not follow each other in the data."""
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in SEQUENTIAL:
            return b"".join((data[: at + 5], struct.pack(">H", height), data[at + 7 :]))
        if marker == SCAN or marker in NO_LENGTH or 0xC2 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return None
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None


@lru_cache
def can_stop_early() -> bool:
    """Whether this simplejpeg leaves decoded rows in the buffer when it warns of bytes that are left over."""
    image = np.arange(64 * 48 * 3, dtype=np.uint32).reshape(64, 48, 3) % 251
    data = simplejpeg.encode_jpeg(image.astype(np.uint8), colorsubsampling="420")
    cut, buffer = with_height(data, 24), np.empty(24 * 48 * 3, np.uint8)
    assert cut is not None
    try:
        simplejpeg.decode_jpeg(cut, buffer=buffer)
    except ValueError as error:
        rows = 24 - ROWS_AHEAD
        whole = simplejpeg.decode_jpeg(data)
        return bool(LEFT_OVER.match(str(error))) and np.array_equal(buffer.reshape(24, 48, 3)[:rows], whole[:rows])
    return False


def _fraction(side: int, least: int) -> int:
    """8, 4, 2 or 1: the largest at which `side` pixels become at least `least`; 1 if least is 0."""
    return next((fraction for fraction in (8, 4, 2) if least and side // fraction >= least), 1)
