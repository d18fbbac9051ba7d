"""Other data loaders on the same images: Pillow, torchvision's transforms, float tensors, as in their documentation.

Every function returns a data set for torch's DataLoader. images: an image folder; shards: the same images as WebDataset
shards; own: an empty folder in which the function may write the images in another format; side: pixels of a crop.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image


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
    from webdataset import WebDataset

    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    augment = transform(side)
    data = WebDataset(urls, shardshuffle=100, empty_check=False).shuffle(500).decode("pilrgb")
    return data.to_tuple("jpg", "cls").map_tuple(augment, int)


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


OTHER_LOADERS = {
    "webdataset": webdataset,
    "torchvision ImageFolder": image_folder,
    "MosaicML Streaming": mosaic,
    "litdata": litdata,
}


def _pillow(image: Any) -> Image.Image:
    """litdata returns tensors or Pillow images, depending on what was written."""
    from torchvision.transforms.v2.functional import to_pil_image

    return image.convert("RGB") if isinstance(image, Image.Image) else to_pil_image(image)


def _files(images: Path) -> list[tuple[Path, int]]:
    return [(path, int(path.parent.name[-2:])) for path in sorted(images.rglob("*.jpg"))]
