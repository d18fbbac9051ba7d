"""RandAugment, random erasing, mixup and CutMix: timm's, with every draw keyed by the position of a sample.

timm's parts draw from the global generators of Python, NumPy and torch. `keyed_generators` sets these to a key before
each draw and gives them back as they were, so an image is a function of seed and position: the same for any number of
ranks, workers and micro-batches, and after a resume. RandAugment runs in the workers; erasing and mixing run on the
device, on normalised images, because the erased pixels are normal noise there (Zhong et al. 2020, arXiv 1708.04896).

Images are mixed in pairs: the positions 2n and 2n + 1 share one draw and mix with each other, as timm's mode "pair".
The release of MAE takes mode "batch" instead: one draw for all images of a GPU, paired from both ends. A pair does not
depend on how a global batch is split, and neighbouring positions hold unrelated images (`data/order.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from mimscale.data.config import DataConfig
from mimscale.data.manifest import Ints
from mimscale.types import IMAGENET_MEAN, Batch, Mixing

ERASE, MIX = "erase", "mix"
"""Keys in `Batch.noise`: int64 [B], the key of each image's erasing; float32 [B, 7], see `draw_mixing`."""
RAND_AUGMENT = "rand_augment"
Seed = Callable[[int], None]
Transform = Callable[[Image.Image], Image.Image]


@contextmanager
def keyed_generators(device: torch.device | None = None) -> Iterator[Seed]:
    """Gives a function that sets the generators of `random`, NumPy and torch (of the CPU and of a device, if one is
    named) to an integer of 64 bits. Afterwards all of them are as they were.
    """
    python, numpy = random.getstate(), np.random.get_state()
    of_torch = [] if device is None else [torch.default_generator]
    if device is not None and device.type == "cuda":
        of_torch.append(torch.cuda.default_generators[device.index or 0])
    states = [generator.get_state() for generator in of_torch]

    def seed(key: int) -> None:
        key &= 0xFFFFFFFFFFFFFFFF
        random.seed(key)
        np.random.seed([key >> 32, key & 0xFFFFFFFF])
        for generator in of_torch:
            generator.manual_seed(key & 0x7FFFFFFFFFFFFFFF)

    try:
        yield seed
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in zip(of_torch, states, strict=True):
            generator.set_state(state)


def make_rand_augment(data: DataConfig) -> Transform | None:
    """timm's RandAugment (Cubuk et al. 2020) on the crop, with the settings of its `create_transform`; None: off."""
    if data.rand_augment is None:
        return None
    from timm.data.auto_augment import posterize, rand_augment_transform
    from timm.data.transforms import str_to_pil_interp

    settings = {
        "translate_const": int(data.image_size * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in IMAGENET_MEAN),
        "interpolation": str_to_pil_interp(data.interpolation),
    }
    transform = rand_augment_transform(data.rand_augment, settings)
    for op in transform.ops:
        if op.aug_fn is posterize:
            op.aug_fn = posterized
    found: Transform = transform
    return found


def posterized(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """The upper `bits` of each channel. timm asks for none of them at the largest magnitude, which is black; Pillow
    gave that until its release 13 refused it.
    """
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits >= 1 else Image.new(image.mode, image.size)


def rand_augmented(transform: Transform, crop: object, flip: bool) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] of a crop (Pillow's or an array), mirrored before that if `flip`."""
    image = crop if isinstance(crop, Image.Image) else Image.fromarray(np.ascontiguousarray(np.asarray(crop)))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(transform(image))


# -------------------------------------------------------------------------------------------------------------- mixing


def with_partners(positions: Ints) -> Ints:
    """int64 [K, B] positions of micro-batches -> [K, B + E]: behind them the partners that are not in their own row.

    E = 0 where micro-batches hold whole pairs. All rows lack equally many.
    """
    return np.stack([np.concatenate([row, np.setdiff1d(row ^ 1, row)]) for row in positions])


def partner_rows(positions: Ints) -> Ints:
    """int64 [B + E]: where the partner of each position stands among them."""
    order = np.argsort(positions, kind="stable")
    rows: Ints = order[np.searchsorted(positions[order], positions ^ 1)]
    return rows


def draw_mixing(mixing: Mixing, side: int) -> NDArray[np.float32]:
    """float32 [7] of one pair, from NumPy's generator as timm draws them: the share of the own image and that of the
    partner, which sum to 1; the box (top, bottom, left, right) that CutMix takes from the partner; 1 if it is CutMix.
    """
    from timm.data.mixup import Mixup, cutmix_bbox_and_lam

    drawer = Mixup(mixing.mixup, mixing.cutmix, prob=mixing.prob, switch_prob=mixing.switch)
    share, cuts = drawer._params_per_batch()
    box = (0, 0, 0, 0)
    if cuts and share != 1:
        box, share = cutmix_bbox_and_lam((side, side), share)
    return np.array([share, 1 - share, *box, cuts], np.float32)


def mix(batch: Batch, mixing: Mixing, own: int) -> Batch:
    """The first `own` images, normalised, mixed with their partners; `soft_labels` are the labels, mixed alike.

    The arithmetic is that of timm's Mixup: to the bit on the same pair and draw.
    """
    from timm.data.mixup import one_hot

    assert batch.partners is not None and batch.labels is not None
    partners, drawn = batch.partners[:own], batch.noise[MIX][:own]
    share, rest, top, bottom, left, right, cuts = (column.view(-1, 1, 1, 1) for column in drawn.unbind(1))
    images, others = batch.images[:own], batch.images[partners]
    rows = torch.arange(images.shape[2], device=images.device).view(1, 1, -1, 1)
    columns = torch.arange(images.shape[3], device=images.device)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    mixed = torch.where(cuts > 0, torch.where(inside, others, images), images * share + others * rest)
    off = mixing.smoothing / mixing.classes
    hot = one_hot(batch.labels, mixing.classes, on_value=1.0 - mixing.smoothing + off, off_value=off)
    soft = hot[:own] * share.view(-1, 1) + hot[partners] * rest.view(-1, 1)
    return replace(replace(batch, partners=None).first(own), images=mixed, soft_labels=soft)


# ------------------------------------------------------------------------------------------------------ on the device


class DeviceAugmentation:
    """Random erasing, then mixing, of normalised images on their device. own: images of a micro-batch; what a batch
    has behind these are partners. The erased pixels depend on the kind of device, on nothing else.
    """

    def __init__(self, data: DataConfig, mixing: Mixing | None, own: int) -> None:
        self._probability, self._mixing, self._own = data.random_erasing, mixing, own

    def __call__(self, raw: Batch, batch: Batch) -> Batch:
        """raw: the batch in host memory. batch: its copy, normalised; its images may be changed in place."""
        if self._probability:
            erase(batch.images, raw.noise[ERASE], self._probability)
        return batch if self._mixing is None else mix(batch, self._mixing, self._own)


def erase(images_B3HW: Tensor, keys_B: Tensor, probability: float) -> None:
    """timm's random erasing in mode "pixel", in place: one rectangle of 2 % to a third of the area becomes unit noise.

    keys: int64 in host memory, one per image.
    """
    from timm.data.random_erasing import RandomErasing

    eraser = RandomErasing(probability, mode="pixel", device=images_B3HW.device)
    with keyed_generators(images_B3HW.device) as seed:
        for image, key in zip(images_B3HW, keys_B.tolist(), strict=True):
            seed(key)
            eraser(image)
