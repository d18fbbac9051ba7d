"""Datasets that run in the workers: positions -> `Batch`. A batch is a function of its positions alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mimscale.data import color_jitter, noise
from mimscale.data.config import DataConfig
from mimscale.data.decode import AnyImage, UndecodedJpeg, decode, make_decoder
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
from mimscale.types import Batch, Damage, EncodedImages, Needs, Noise


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
        self.reader = SampleReader(manifest, make_decoder(data.decoder, data.decode_short_side))
        self.decoding_reader = SampleReader(manifest, decode) if data.decoder == "device" else self.reader

    def __getitem__(self, item: tuple[Ints, Ints]) -> list[Batch]:
        image_positions, crop_positions = item
        ids = self.order.ids(image_positions)
        self.manifest.read_ahead(ids)
        images = (
            self._reader(position).load_or_substitute(sample, self.seed, *divmod(position, self.manifest.samples))
            for sample, position in zip(ids.tolist(), image_positions.tolist(), strict=True)
        )
        return self.batch_builder(crop_positions, images, self.manifest)

    def _reader(self, position: int) -> SampleReader:
        """An image that is also needed uncropped must be decoded here, whatever `data.decoder` is."""
        builder = self.batch_builder
        uncropped = position % builder.global_batch < builder.needs.uncropped_images
        return self.decoding_reader if uncropped else self.reader


class BatchBuilder:
    """Crops, flips and collates images into batches. All random numbers are keyed by positions.

    samples: number of positions in an epoch.
    """

    def __init__(self, samples: int, data: DataConfig, needs: Needs, seed: int, global_batch: int):
        self.samples, self.data, self.needs, self.seed, self.global_batch = samples, data, needs, seed, global_batch

    def __call__(
        self,
        positions: Ints,
        samples: Iterator[tuple[int, AnyImage | UndecodedJpeg, list[Damage]]],
        manifest: Indexed | None,
    ) -> list[Batch]:
        """int64 [rows, B] positions, and B samples (id, image, damage found before it) -> one Batch per row.

        Each image is used before the next one is taken from `samples`, because decoders may reuse their buffer.
        manifest: has the labels, if the method needs them.
        """
        side, (rows, total) = self.data.image_size, positions.shape
        crops = np.empty((rows, total, 3, side, side), np.uint8)
        boxes, flips = np.empty((rows, total, 4), np.float32), np.empty((rows, total), np.bool_)
        uncropped_rows = np.flatnonzero(positions[0] % self.global_batch < self.needs.uncropped_images)
        uncropped = np.empty((len(uncropped_rows), 3, side, side), np.uint8) if self.needs.uncropped_images else None
        ids, damage = np.empty(total, np.int64), list[Damage]()
        jpegs = list[tuple[bytes, int, Box]]()
        for column in range(total):
            ids[column], image, found = next(samples)
            damage += found
            for row in range(rows):
                epoch, index = divmod(int(positions[row, column]), self.samples)
                numbers = noise.uniform(self.seed, "crop", epoch, index, n=CROP_NUMBERS).tolist()
                flips[row, column] = numbers[-1] < self.data.flip
                if isinstance(image, UndecodedJpeg):
                    box = self._random_box((image.height, image.width), numbers)
                    boxes[row, column] = relative_box(box, (image.height, image.width))
                    jpegs.append((image.data, column, box))
                    continue
                crop, boxes[row, column] = self._crop(image, numbers)
                crops[row, column] = to_pixels(crop, flips[row, column])
            if uncropped is not None and column in uncropped_rows:
                assert not isinstance(image, UndecodedJpeg)
                square = resized_to_square(image, side, self.data.interpolation)
                uncropped[uncropped_rows.searchsorted(column)] = to_pixels(square)
        labels = _labels(manifest, ids) if self.needs.labels and manifest is not None else None
        return [
            Batch(
                images=torch.from_numpy(crops[row]),
                ids=torch.from_numpy(ids),
                positions=torch.from_numpy(np.array(positions[row])),
                noise=self._all_noise(positions[row]),
                boxes=torch.from_numpy(boxes[row]),
                flips=torch.from_numpy(flips[row]),
                labels=labels,
                uncropped=None if uncropped is None else torch.from_numpy(uncropped),
                uncropped_rows=None if uncropped is None else torch.from_numpy(uncropped_rows),
                damage=tuple(damage) if row == 0 else (),
                encoded=_encoded_images(jpegs) if jpegs else None,
            )
            for row in range(rows)
        ]

    def _crop(self, image: AnyImage, numbers: list[float]) -> tuple[AnyImage | NDArray[np.uint8], tuple[float, ...]]:
        """The crop, and its box as fractions of the stored image."""
        data = self.data
        if data.crop == "padded":
            image = resized_short_side(image, data.image_size, data.interpolation)
            size = image.height, image.width
            box: Box = padded_crop_box(size, data.image_size, data.crop_padding, numbers[-3:-1])
            return padded_crop(image, box, data.crop_padding), relative_box(box, size)
        size = image.height, image.width
        box = self._random_box(size, numbers)
        return resized_crop(image, box, data.image_size, data.interpolation), relative_box(box, size)

    def _random_box(self, size: tuple[int, int], numbers: list[float]) -> Box:
        return random_resized_crop_box(size, self.data.crop_scale, self.data.crop_ratio, numbers)

    def _all_noise(self, positions: Ints) -> dict[str, Tensor]:
        keys = [divmod(int(position), self.samples) for position in positions]  # (epoch, index in it)
        drawn = {name: self._noise(name, wanted, keys) for name, wanted in self.needs.noise.items()}
        if any(self.data.colour_jitter):
            rows = [color_jitter.draw_factors(self.data.colour_jitter, self.seed, *key) for key in keys]
            drawn[color_jitter.PURPOSE] = torch.from_numpy(np.stack(rows))
        return drawn

    def _noise(self, name: str, wanted: Noise, keys: list[tuple[int, int]]) -> Tensor:
        draw = noise.uniform if wanted.kind == "uniform" else noise.exponential
        n = int(np.prod(wanted.shape))
        rows = [draw(self.seed, f"noise/{name}", *key, n=n) for key in keys]
        return torch.from_numpy(np.stack(rows).reshape(-1, *wanted.shape))


class EvalDataset(Dataset[list[Batch]]):
    """(int64 [B] sample ids, float32 [B] weights) -> one Batch of center crops, by Pillow. Raises DamagedSample."""

    def __init__(self, manifest: Manifest, side: int, crop_pct: float):
        self.manifest, self.side, self.crop_pct = manifest, side, crop_pct
        self.reader = SampleReader(manifest, decode)

    def __getitem__(self, item: tuple[Ints, NDArray[np.float32]]) -> list[Batch]:
        ids, weights = item
        distinct = np.unique(ids)
        self.manifest.read_ahead(distinct)
        crop_of = {i: center_crop(self.reader.load(i), self.side, self.crop_pct) for i in distinct.tolist()}
        crops = [crop_of[i] for i in ids.tolist()]
        batch = Batch(
            images=torch.from_numpy(np.stack([to_pixels(image) for image, _ in crops])),
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(ids),
            noise={},
            boxes=torch.tensor([box for _, box in crops], dtype=torch.float32),
            flips=torch.zeros(len(ids), dtype=torch.bool),
            labels=None if self.manifest.labels is None else _labels(self.manifest, ids),
            weights=torch.from_numpy(weights),
        )
        return [batch]


def _encoded_images(jpegs: list[tuple[bytes, int, Box]]) -> EncodedImages:
    """jpegs: (bytes, row of the batch, crop box) of each."""
    data, rows, boxes = zip(*jpegs, strict=True)
    sizes = torch.tensor([len(jpeg) for jpeg in data])
    joined = torch.from_numpy(np.frombuffer(b"".join(data), np.uint8).copy())
    return EncodedImages(joined, sizes, torch.tensor(rows), torch.tensor(boxes))


def _labels(manifest: Indexed, ids: Ints) -> Tensor:
    assert manifest.labels is not None
    return torch.from_numpy(np.array(manifest.labels[ids]))
