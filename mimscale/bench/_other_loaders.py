"""Other data loaders on the same images. Every function returns a data set for torch's DataLoader.

The first four are written as in their documentation: Pillow, torchvision's transforms, float tensors. The careful ones
avoid all that can be avoided with torchvision alone: its own JPEG decoder, crop and flip on uint8, uint8 batches.

images: an image folder; shards: the same images as WebDataset shards; own: an empty folder in which the function may
write the images in another format; side: pixels of a crop.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset


def transform(side: int) -> Callable[[Image.Image], torch.Tensor]:
    from torchvision.transforms import InterpolationMode, v2

    return v2.Compose(
        [
            v2.RandomResizedCrop(side, (0.2, 1.0), interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


def image_folder(images: Path, own: Path, shards: Path, side: int) -> Any:
    from torchvision.datasets import ImageFolder

    return ImageFolder(str(images), transform(side))


def webdataset(images: Path, own: Path, shards: Path, side: int) -> Any:
    return _webdataset(shards).decode("pilrgb").to_tuple("jpg", "cls").map_tuple(transform(side), int)


def _webdataset(shards: Path) -> Any:
    from webdataset import WebDataset

    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    return WebDataset(urls, shardshuffle=100, empty_check=False).shuffle(500)


def mosaic(images: Path, own: Path, shards: Path, side: int) -> Any:
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(own), columns={"image": "jpeg", "label": "int"}) as out:
        for path, label in _files(images):
            out.write({"image": Image.open(path), "label": label})
    augment = transform(side)

    class Data(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            return augment(sample["image"].convert("RGB")), sample["label"]

    return Data(local=str(own), shuffle=True, batch_size=64)


def litdata(images: Path, own: Path, shards: Path, side: int) -> Any:
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(own), chunk_bytes="64MB")
    for number, (path, label) in enumerate(_files(images)):
        writer[number] = {"image": Image.open(path), "label": label}
    writer.done()
    writer.merge()
    augment = transform(side)

    class Data(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            return augment(_pillow(sample["image"])), sample["label"]

    return Data(str(own), shuffle=True)


class CarefulFolder(Dataset[Any]):
    """JPEG files by their path -> (uint8 [3, side, side], label)."""

    def __init__(self, images: Path, side: int):
        self.files, self.augment = _files(images), uint8_transform(side)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, at: int) -> Any:
        path, label = self.files[at]
        return self.augment(_torchvision_decode(path.read_bytes())), label


def careful_folder(images: Path, own: Path, shards: Path, side: int) -> Any:
    _ignore_warnings()
    return CarefulFolder(images, side)


def careful_webdataset(images: Path, own: Path, shards: Path, side: int) -> Any:
    _ignore_warnings()
    augment = uint8_transform(side)
    return _webdataset(shards).to_tuple("jpg", "cls").map_tuple(lambda data: augment(_torchvision_decode(data)), int)


def _ignore_warnings() -> None:
    """Once, not for each image: torchvision's decoders are deprecated, and the bytes that they read are read-only."""
    warnings.filterwarnings("ignore", "(?s).*(are deprecated|is not writable)")


def uint8_transform(side: int) -> Callable[[torch.Tensor], torch.Tensor]:
    from torchvision.transforms import InterpolationMode, v2

    crop = v2.RandomResizedCrop(side, (0.2, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])


def _torchvision_decode(data: bytes) -> torch.Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.RGB)


OTHER_LOADERS = {
    "webdataset": webdataset,
    "torchvision ImageFolder": image_folder,
    "MosaicML Streaming": mosaic,
    "litdata": litdata,
    "torchvision decode_jpeg, uint8, files": careful_folder,
    "torchvision decode_jpeg, uint8, webdataset": careful_webdataset,
}


def _pillow(image: Any) -> Image.Image:
    """litdata returns tensors or Pillow images, depending on what was written."""
    from torchvision.transforms.v2.functional import to_pil_image

    return image.convert("RGB") if isinstance(image, Image.Image) else to_pil_image(image)


def _files(images: Path) -> list[tuple[Path, int]]:
    return [(path, int(path.parent.name[-2:])) for path in sorted(images.rglob("*.jpg"))]
