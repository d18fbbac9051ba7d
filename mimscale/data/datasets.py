"""Datasets that run in the workers: positions -> `Batch`. A batch is a function of its positions alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mimscale.data import augment, color_jitter, noise
from mimscale.data.config import DataConfig
from mimscale.data.decode import AnyImage, Part, Size, Wanted, decode, make_decoder
from mimscale.data.manifest import Ints, Manifest
from mimscale.data.mixture import AnyOrder, Indexed
from mimscale.data.sample_reader import SampleReader
from mimscale.data.transforms import (
    CROP_NUMBERS,
    Box,
    center_crop,
    padded_crop,
    padded_crop_box,
    random_resized_crop_box,
    relative_box,
    resized_crop,
    resized_short_side,
    resized_to_square,
    to_pixels,
)
from mimscale.types import Batch, Damage, Mixing, Needs, Noise

Load = Callable[[int, Wanted], tuple[int, AnyImage, list[Damage]]]
"""(column, see decode.Decoder) -> sample id, its image, damage found before it."""
Empty = Callable[[int, tuple[int, ...]], list[NDArray[np.uint8]]]


def empty(batches: int, shape: tuple[int, ...]) -> list[NDArray[np.uint8]]:
    return [np.empty(shape, np.uint8) for _ in range(batches)]


class TrainDataset(Dataset[list[Batch]]):
    """(image positions int64 [B], crop positions int64 [rows, B]) -> one Batch of random crops per row.

    All rows hold crops of the same images, those that the order has at the image positions. With data.crops = 1 there
    is one row, and it equals the image positions. Samples that cannot be used are substituted and listed in the first
    row's `damage`.
    """

    def __init__(
        self,
        manifest: Indexed,
        order: AnyOrder,
        data: DataConfig,
        needs: Needs,
        seed: int,
        global_batch: int,
    ):
        self.manifest, self.order, self.seed = manifest, order, seed
        self.batch_builder = BatchBuilder(manifest.samples, data, needs, seed, global_batch)
        self.reader = SampleReader(manifest, make_decoder(data))

    def use(self, memory: Empty) -> None:
        self.batch_builder.empty = memory

    def __getitem__(self, item: tuple[Ints, Ints]) -> list[Batch]:
        image_positions, crop_positions = item
        ids = self.order.ids(image_positions)
        self.manifest.read_ahead(ids)
        samples = list(zip(ids.tolist(), image_positions.tolist(), strict=True))

        def load(column: int, wanted: Wanted) -> tuple[int, AnyImage, list[Damage]]:
            sample, position = samples[column]
            key = divmod(position, self.manifest.samples)
            return self.reader.load_or_substitute(sample, self.seed, *key, wanted=wanted)

        return self.batch_builder(crop_positions, load, self.manifest)


class BatchBuilder:
    """Crops, flips and collates images into batches. All random numbers are keyed by positions.

    samples: number of positions in an epoch. empty: (number of batches, shape of the images of one) -> uint8 arrays to
    fill; a worker sets it to its pool of shared memory, so that finished images need not be copied there.
    """

    def __init__(self, samples: int, data: DataConfig, needs: Needs, seed: int, global_batch: int):
        self.samples, self.data, self.needs, self.seed, self.global_batch = samples, data, needs, seed, global_batch
        self.rand_augment = augment.make_rand_augment(data)
        self.empty: Empty = empty

    def __call__(self, positions: Ints, load: Load, manifest: Indexed | None) -> list[Batch]:
        """int64 [rows, B] positions -> one Batch per row.

        load: gives the images of the columns, in their order. Each is used before the next one is asked for, because
        decoders may reuse their buffer. manifest: has the labels, if the method needs them.
        """
        side, (rows, total) = self.data.image_size, positions.shape
        images = [_colours_first(array) for array in self.empty(rows, (total, side, side, 3))]
        boxes, flips = np.empty((rows, total, 4), np.float32), np.empty((rows, total), np.bool_)
        uncropped_rows = np.flatnonzero(positions[0] % self.global_batch < self.needs.uncropped_images)
        uncropped = _colours_first(np.empty((len(uncropped_rows), side, side, 3), np.uint8))
        whole = set(uncropped_rows.tolist())
        ids, damage = np.empty(total, np.int64), list[Damage]()
        augments = None if self.rand_augment is None else self._raw(augment.RAND_AUGMENT, self._keys(positions), 1)
        numbers = noise.to_uniform(self._raw("crop", self._keys(positions), CROP_NUMBERS)).reshape(rows, total, -1)
        for column in range(total):
            crops = _Crops(self.data, numbers[:, column].tolist(), column in whole)
            ids[column], image, found = load(column, crops.wanted)
            damage += found
            for row, crop_numbers in enumerate(crops.numbers):
                flips[row, column] = flip = crop_numbers[-1] < self.data.flip
                crop, boxes[row, column] = crops.cut(image, row)
                if augments is None:
                    images[row][column] = to_pixels(crop, flip)
                else:
                    images[row][column] = self._augmented(crop, flip, int(augments[row * total + column, 0]))
            if column in whole:
                square = resized_to_square(image, side, self.data.interpolation)
                uncropped[uncropped_rows.searchsorted(column)] = to_pixels(square)
        labels = _labels(manifest, ids) if self.needs.labels and manifest is not None else None
        partners = None if self.needs.mixing is None else torch.from_numpy(augment.partner_rows(positions[0]))
        return [
            Batch(
                images=torch.from_numpy(images[row]),
                ids=torch.from_numpy(ids),
                positions=torch.from_numpy(np.array(positions[row])),
                noise=self._all_noise(positions[row]),
                boxes=torch.from_numpy(boxes[row]),
                flips=torch.from_numpy(flips[row]),
                labels=labels,
                partners=partners,
                uncropped=torch.from_numpy(uncropped) if self.needs.uncropped_images else None,
                uncropped_rows=torch.from_numpy(uncropped_rows) if self.needs.uncropped_images else None,
                damage=tuple(damage) if row == 0 else (),
            )
            for row in range(rows)
        ]

    def _augmented(self, crop: AnyImage | NDArray[np.uint8], flip: bool, key: int) -> NDArray[np.uint8]:
        assert self.rand_augment is not None
        with augment.keyed_generators() as seed:
            seed(key)
            return to_pixels(augment.rand_augmented(self.rand_augment, crop, flip))

    def _keys(self, positions: Ints) -> list[tuple[int, int]]:
        """(epoch, index in it) of each."""
        return [divmod(position, self.samples) for position in positions.ravel().tolist()]

    def _raw(self, purpose: str, keys: list[tuple[int, int]], n: int) -> NDArray[np.uint64]:
        """uint64 [keys, n]."""
        return np.stack([noise.raw(self.seed, purpose, *key, n=n) for key in keys])

    def _all_noise(self, positions: Ints) -> dict[str, Tensor]:
        keys = self._keys(positions)
        drawn = {name: self._noise(name, wanted, keys) for name, wanted in self.needs.noise.items()}
        if any(self.data.colour_jitter):
            rows = [color_jitter.draw_factors(self.data.colour_jitter, self.seed, *key) for key in keys]
            drawn[color_jitter.PURPOSE] = torch.from_numpy(np.stack(rows))
        if self.data.random_erasing:
            drawn[augment.ERASE] = torch.from_numpy(self._raw(augment.ERASE, keys, 1)[:, 0].view(np.int64))
        if self.needs.mixing is not None:
            drawn[augment.MIX] = torch.from_numpy(self._mixing(self.needs.mixing, positions))
        return drawn

    def _mixing(self, mixing: Mixing, positions: Ints) -> NDArray[np.float32]:
        """float32 [B, 7]: both images of a pair have the draw of its first position."""
        pairs, pair_of = np.unique(positions - positions % 2, return_inverse=True)
        rows = []
        with augment.keyed_generators() as seed:
            for key in self._raw(augment.MIX, self._keys(pairs), 1)[:, 0].tolist():
                seed(key)
                rows.append(augment.draw_mixing(mixing, self.data.image_size))
        return np.stack(rows)[pair_of]

    def _noise(self, name: str, wanted: Noise, keys: list[tuple[int, int]]) -> Tensor:
        integers = self._raw(f"noise/{name}", keys, int(np.prod(wanted.shape)))
        convert = noise.to_uniform if wanted.kind == "uniform" else noise.to_exponential
        return torch.from_numpy(convert(integers).reshape(-1, *wanted.shape))


class _Crops:
    """The crops of one image. numbers: of each crop, random, in [0, 1).  whole: is the whole image needed too?"""

    def __init__(self, data: DataConfig, numbers: list[list[float]], whole: bool):
        self.data, self.numbers, self.whole = data, numbers, whole
        self._boxes: dict[Size, list[Box]] = {}

    def wanted(self, size: Size) -> Part:
        if self.whole or self.data.crop != "random_resized":
            return Part(size[0], min(size))
        boxes = self._random_boxes(size)
        return Part(max(top + height for top, _, height, _ in boxes), min(min(box[2:]) for box in boxes))

    def cut(self, image: AnyImage, number: int) -> tuple[AnyImage | NDArray[np.uint8], tuple[float, ...]]:
        """The crop, and its box as fractions of the stored image."""
        data = self.data
        if data.crop == "center":
            return center_crop(image, data.image_size, data.eval_crop_pct)
        if data.crop == "padded":
            image = resized_short_side(image, data.image_size, data.interpolation)
            size = image.height, image.width
            box = padded_crop_box(size, data.image_size, data.crop_padding, self.numbers[number][-3:-1])
            return padded_crop(image, box, data.crop_padding), relative_box(box, size)
        size = image.height, image.width
        box = self._random_boxes(size)[number]
        return resized_crop(image, box, data.image_size, data.interpolation), relative_box(box, size)

    def _random_boxes(self, size: Size) -> list[Box]:
        if size not in self._boxes:
            scale, ratio = self.data.crop_scale, self.data.crop_ratio
            self._boxes[size] = [random_resized_crop_box(size, scale, ratio, numbers) for numbers in self.numbers]
        return self._boxes[size]


class EvalDataset(Dataset[list[Batch]]):
    """(int64 [B] sample ids, float32 [B] weights) -> one Batch of center crops, by Pillow. Raises DamagedSample."""

    def __init__(self, manifest: Manifest, side: int, crop_pct: float):
        self.manifest, self.side, self.crop_pct = manifest, side, crop_pct
        self.empty: Empty = empty  # see BatchBuilder
        self.reader = SampleReader(manifest, decode)

    def use(self, memory: Empty) -> None:
        self.empty = memory

    def __getitem__(self, item: tuple[Ints, NDArray[np.float32]]) -> list[Batch]:
        ids, weights = item
        distinct = np.unique(ids)
        self.manifest.read_ahead(distinct)
        crop_of = {i: center_crop(self.reader.load(i), self.side, self.crop_pct) for i in distinct.tolist()}
        crops = [crop_of[i] for i in ids.tolist()]
        images = _colours_first(*self.empty(1, (len(ids), self.side, self.side, 3)))
        for row, (image, _) in enumerate(crops):
            images[row] = to_pixels(image)
        batch = Batch(
            images=torch.from_numpy(images),
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(ids),
            noise={},
            boxes=torch.tensor([box for _, box in crops], dtype=torch.float32),
            flips=torch.zeros(len(ids), dtype=torch.bool),
            labels=None if self.manifest.labels is None else _labels(self.manifest, ids),
            weights=torch.from_numpy(weights),
        )
        return [batch]


def _colours_first(images_BHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [B, 3, H, W], a view: in memory the order is that of the resized crops, and the device changes it. Here it
    would take a third of the resize's time."""
    return images_BHWC.transpose(0, 3, 1, 2)


def _labels(manifest: Indexed, ids: Ints) -> Tensor:
    assert manifest.labels is not None
    return torch.from_numpy(np.array(manifest.labels[ids]))
