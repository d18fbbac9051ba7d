"""Colour jitter: the numbers are drawn by the loader with everything else random, the arithmetic runs on the device."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimscale.data import noise
from mimscale.types import Batch, normalised

PURPOSE = "colour"  # in `Batch.noise`: float32 [B, 6], see `drawn`
GREY = (0.2989, 0.587, 0.114)  # torchvision's weights
_ORDERS = np.array(list(permutations(range(3))), np.float32)
_BRIGHTNESS, _CONTRAST = 0, 1


def drawn(strengths: tuple[float, float, float], seed: int, epoch: int, place: int) -> NDArray[np.float32]:
    """float32 [6]: factors of brightness, contrast and saturation, each uniform in [max(0, 1 - s), 1 + s], and the
    order in which these (0, 1, 2) are applied, as torchvision's ColorJitter draws them.
    """
    numbers = noise.uniform(seed, PURPOSE, epoch, place, n=4)
    most = np.array(strengths, np.float32)
    low = np.maximum(0, 1 - most)
    factors = low + (1 + most - low) * numbers[:3]
    return np.concatenate([factors, _ORDERS[int(6 * numbers[3])]])


def jittered(images_B3HW: Tensor, colour_B6: Tensor) -> Tensor:
    """float images in 0..1 -> the same, each with its own factors in its own order.

    Each of the three moves a picture away from, or towards, another one: black, its mean grey, itself in grey.
    """
    for step in range(3):
        which_B = colour_B6[:, 3 + step].long()
        factor, which = (value.view(-1, 1, 1, 1) for value in (colour_B6.gather(1, which_B[:, None]), which_B))
        red, green, blue = (weight * images_B3HW[:, c : c + 1] for c, weight in enumerate(GREY))
        grey = red + green + blue
        other = torch.where(which == _CONTRAST, grey.mean((1, 2, 3), keepdim=True), grey)
        other = other.masked_fill(which == _BRIGHTNESS, 0)
        images_B3HW = torch.lerp(other, images_B3HW, factor).clamp(0, 1)
    return images_B3HW


def finished(batch: Batch) -> Batch:
    """uint8 images -> float32, jittered where the loader drew numbers for it, and normalised."""
    if PURPOSE not in batch.noise:
        return batch.normalised()
    images = jittered(batch.images.float() / 255, batch.noise[PURPOSE])
    return replace(batch, images=normalised(images * 255))
