"""Positions -> `Batch`: what a worker does. A batch is a function of its positions alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mimscale.data import color_jitter, noise
from mimscale.data.config import DataConfig
from mimscale.data.decode import AnyPicture, Undecoded, decode, decoder
from mimscale.data.manifest import Ints, Manifest
from mimscale.data.order import Order
from mimscale.data.sample_reader import Reader
from mimscale.data.transforms import (
    CROP_NUMBERS,
    Box,
    centre_crop,
    fractions,
    padded_box,
    padded_crop,
    pixels,
    random_box,
    resized,
    resized_crop,
    squeezed,
)
from mimscale.types import Batch, Damage, EncodedImages, Needs, Noise


class TrainSamples(Dataset[list[Batch]]):
    """(int64 [B] places in the order, int64 [rows, B] positions) -> one Batch of random crops per row of positions.

    The images of all rows are those at the places. Without `data.crops` there is one row and the two are the same.
    Samples that cannot be used are substituted and stand in the first row's `damage`.
    """

    def __init__(self, manifest: Manifest, order: Order, data: DataConfig, needs: Needs, seed: int, global_batch: int):
        self.manifest, self.order, self.seed = manifest, order, seed
        self.crops = Crops(manifest.samples, data, needs, seed, global_batch)
        self.reader = Reader(manifest, decoder(data.decoder, data.decode_short_side))
        self.exact = Reader(manifest, decode) if data.decoder == "device" else self.reader

    def __getitem__(self, item: tuple[Ints, Ints]) -> list[Batch]:
        at, positions = item
        ids = self.order.ids(at)
        self.manifest.read_ahead(ids)
        pictures = (
            self._reader(place).load_or_substitute(sample, self.seed, *divmod(place, self.manifest.samples))
            for sample, place in zip(ids.tolist(), at.tolist(), strict=True)
        )
        return self.crops(positions, pictures, self.manifest)

    def _reader(self, place: int) -> Reader:
        """Where the uncut picture is wanted as well, it cannot be left undecoded."""
        return self.exact if place % self.crops.global_batch < self.crops.needs.uncropped_images else self.reader


class Crops:
    """Pictures -> batches; all that is random is keyed by positions. samples: how many positions an epoch has."""

    def __init__(self, samples: int, data: DataConfig, needs: Needs, seed: int, global_batch: int):
        self.samples, self.data, self.needs, self.seed, self.global_batch = samples, data, needs, seed, global_batch

    def __call__(
        self,
        positions: Ints,
        pictures: Iterator[tuple[int, AnyPicture | Undecoded, list[Damage]]],
        manifest: Manifest | None,
    ) -> list[Batch]:
        """int64 [rows, B] and B pictures, with their ids and the damage met on the way -> one Batch per row.

        A picture is looked at before the next is asked for. manifest: where the labels stand, if any are wanted.
        """
        side, (rows, total) = self.data.image_size, positions.shape
        images = np.empty((rows, total, 3, side, side), np.uint8)
        boxes, flips = np.empty((rows, total, 4), np.float32), np.empty((rows, total), np.bool_)
        uncropped_rows = np.flatnonzero(positions[0] % self.global_batch < self.needs.uncropped_images)
        whole = np.empty((len(uncropped_rows), 3, side, side), np.uint8) if self.needs.uncropped_images else None
        ids, damage = np.empty(total, np.int64), list[Damage]()
        stored = list[tuple[bytes, int, Box]]()
        for column in range(total):
            ids[column], image, found = next(pictures)
            damage += found
            for row in range(rows):
                place = divmod(int(positions[row, column]), self.samples)
                numbers = noise.uniform(self.seed, "crop", *place, n=CROP_NUMBERS).tolist()
                flips[row, column] = numbers[-1] < self.data.flip
                if isinstance(image, Undecoded):
                    box = self._box((image.height, image.width), numbers)
                    boxes[row, column] = fractions(box, (image.height, image.width))
                    stored.append((image.data, column, box))
                    continue
                crop, boxes[row, column] = self._crop(image, numbers)
                images[row, column] = pixels(crop, flips[row, column])
            if whole is not None and column in uncropped_rows:
                assert not isinstance(image, Undecoded)
                squeeze = squeezed(image, side, self.data.interpolation)
                whole[uncropped_rows.searchsorted(column)] = pixels(squeeze)
        labels = _labels(manifest, ids) if self.needs.labels and manifest is not None else None
        return [
            Batch(
                images=torch.from_numpy(images[row]),
                ids=torch.from_numpy(ids),
                positions=torch.from_numpy(np.array(positions[row])),
                noise=self._all_noise(positions[row]),
                boxes=torch.from_numpy(boxes[row]),
                flips=torch.from_numpy(flips[row]),
                labels=labels,
                uncropped=None if whole is None else torch.from_numpy(whole),
                uncropped_rows=None if whole is None else torch.from_numpy(uncropped_rows),
                damage=tuple(damage) if row == 0 else (),
                stored=_stored(stored) if stored else None,
            )
            for row in range(rows)
        ]

    def _crop(
        self, image: AnyPicture, numbers: list[float]
    ) -> tuple[AnyPicture | NDArray[np.uint8], tuple[float, ...]]:
        """The crop and its box as fractions of the stored image."""
        data = self.data
        if data.crop == "padded":
            image = resized(image, data.image_size, data.interpolation)
            size = image.height, image.width
            box: Box = padded_box(size, data.image_size, data.crop_padding, numbers[-3:-1])
            return padded_crop(image, box, data.crop_padding), fractions(box, size)
        size = image.height, image.width
        box = self._box(size, numbers)
        return resized_crop(image, box, data.image_size, data.interpolation), fractions(box, size)

    def _box(self, size: tuple[int, int], numbers: list[float]) -> Box:
        return random_box(size, self.data.crop_scale, self.data.crop_ratio, numbers)

    def _all_noise(self, positions: Ints) -> dict[str, Tensor]:
        places = [divmod(int(position), self.samples) for position in positions]
        numbers = {name: self._noise(name, asked, places) for name, asked in self.needs.noise.items()}
        if any(self.data.colour_jitter):
            rows = [color_jitter.drawn(self.data.colour_jitter, self.seed, *place) for place in places]
            numbers[color_jitter.PURPOSE] = torch.from_numpy(np.stack(rows))
        return numbers

    def _noise(self, name: str, wanted: Noise, places: list[tuple[int, int]]) -> Tensor:
        draw = noise.uniform if wanted.kind == "uniform" else noise.exponential
        n = int(np.prod(wanted.shape))
        rows = [draw(self.seed, f"noise/{name}", *place, n=n) for place in places]
        return torch.from_numpy(np.stack(rows).reshape(-1, *wanted.shape))


class EvalSamples(Dataset[list[Batch]]):
    """(int64 [B] sample ids, float32 [B] weights) -> Batch of centre crops, by Pillow. Raises DamagedSample."""

    def __init__(self, manifest: Manifest, side: int, crop_pct: float):
        self.manifest, self.side, self.crop_pct = manifest, side, crop_pct
        self.reader = Reader(manifest, decode)

    def __getitem__(self, item: tuple[Ints, NDArray[np.float32]]) -> list[Batch]:
        ids, weights = item
        once = np.unique(ids)
        self.manifest.read_ahead(once)
        crops = {i: centre_crop(self.reader.load(i), self.side, self.crop_pct) for i in once.tolist()}
        cut = [crops[i] for i in ids.tolist()]
        batch = Batch(
            images=torch.from_numpy(np.stack([pixels(image) for image, _ in cut])),
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(ids),
            noise={},
            boxes=torch.tensor([box for _, box in cut], dtype=torch.float32),
            flips=torch.zeros(len(ids), dtype=torch.bool),
            labels=None if self.manifest.labels is None else _labels(self.manifest, ids),
            weights=torch.from_numpy(weights),
        )
        return [batch]


def _stored(parts: list[tuple[bytes, int, Box]]) -> EncodedImages:
    data, rows, boxes = zip(*parts, strict=True)
    sizes = torch.tensor([len(part) for part in data])
    whole = torch.from_numpy(np.frombuffer(b"".join(data), np.uint8).copy())
    return EncodedImages(whole, sizes, torch.tensor(rows), torch.tensor(boxes))


def _labels(manifest: Manifest, ids: Ints) -> Tensor:
    assert manifest.labels is not None
    return torch.from_numpy(np.array(manifest.labels[ids]))
