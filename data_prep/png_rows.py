"""Images that lie in a file as arrays of pixels (CIFAR, STL-10, IDX files), handed out as PNG, which loses nothing.

Bytes of a PNG depend on Pillow and zlib, so the plan of such a source records both.
"""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, features

from data_prep.idx import read_idx
from data_prep.plan import Item
from mimscale.errors import UserError

PREFIX = "rows:"  # of Item.column; what follows names the format; Item.offset is the row
CIFAR_TRAIN, CIFAR_TEST, CIFAR100_TRAIN, CIFAR100_TEST, STL10, IDX = (
    f"{PREFIX}{name}" for name in ("cifar10 train", "cifar10 test", "cifar100 train", "cifar100 test", "stl10", "idx")
)
STL10_SHAPE = (3, 96, 96)  # colour, column, row: the file was written by MATLAB


def encoder() -> str:
    """For the plan: other versions may write other bytes."""
    return f"Pillow {PIL.__version__}, zlib {features.version('zlib')}"


def png(item: Item) -> bytes:
    """The image of one row. Raises UserError where the source has changed since it was listed."""
    rows = _rows(item.path, item.column)
    if item.offset >= len(rows) or rows[item.offset].size != item.size:
        raise UserError(f"source file '{item.path}' has changed since it was listed; start again")
    packed = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(rows[item.offset])).save(packed, "PNG")
    return packed.getvalue()


@lru_cache(maxsize=1)
def _rows(path: str, column: str) -> NDArray[np.uint8]:
    """uint8 [N, H, W, 3], grey [N, H, W]. STL-10's file is mapped, not read: its unlabelled part has 2.6 GiB."""
    if column == IDX:
        return read_idx(Path(path), dimensions=3).values()
    if column == STL10:
        try:
            return np.memmap(path, np.uint8, "r").reshape(-1, *STL10_SHAPE).transpose(0, 3, 2, 1)
        except (OSError, ValueError):
            raise UserError(f"source file '{path}' has changed since it was listed; start again") from None
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR100 if column in (CIFAR100_TRAIN, CIFAR100_TEST) else CIFAR10
    try:  # the checksums are compared again, because the batches are pickles
        rows: NDArray[np.uint8] = kind(Path(path).parent, train=column in (CIFAR_TRAIN, CIFAR100_TRAIN)).data
    except RuntimeError:
        raise UserError(f"source '{path}' has changed since it was listed; start again") from None
    return rows
