"""`data.decoder: device`: the trainer's process decodes, crops and resizes on the device what the workers only read.

A worker sends the bytes of a plain JPEG with its crop box and flip (`Batch.encoded`). This module decodes them with
nvJPEG on a GPU and with libjpeg-turbo on a CPU; the CPU path runs the same code where there is no GPU, mainly in tests,
and is slower than decoding in the workers. Workers decode everything that is not a complete plain JPEG. A JPEG that the
device decoder refuses is made again by the CPU path of the workers, with its retries and substitutes, so damage is
found, counted and replaced in the same way for every decoder.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mimscale.data.config import default_decoder
from mimscale.data.datasets import TrainDataset
from mimscale.errors import UserError
from mimscale.types import Batch, EncodedImages

JpegDecoder = Callable[[list[Tensor], torch.device], list[Tensor]]


class DeviceDecoder:
    """Batch -> the same batch with all images decoded, on the device.

    cpu_dataset: decodes on the CPU; makes the rows that the device decoder refuses.
    """

    def __init__(self, cpu_dataset: TrainDataset, device: torch.device):
        self.cpu_dataset, self.device = cpu_dataset, device
        self._decode, _ = jpeg_library()

    def __call__(self, batch: Batch) -> Batch:
        encoded = batch.encoded
        if encoded is None:
            return batch
        images, failed = batch.images.to(self.device, non_blocking=True), []
        decoded = self._decode_all(encoded)
        for row, box, image in zip(encoded.rows.tolist(), encoded.boxes.tolist(), decoded, strict=True):
            top, left, height, width = box
            if image is None or image.shape[1] < top + height or image.shape[2] < left + width:
                failed.append(row)
                continue
            crop = image[:, top : top + height, left : left + width]
            images[row] = self._resize(crop.flip(-1) if batch.flips[row] else crop)
        batch = replace(batch, images=images, encoded=None)
        for row in failed:
            batch = self._replace_row(batch, row)
        return batch

    def _decode_all(self, encoded: EncodedImages) -> list[Tensor | None]:
        """uint8 [3, H, W] each; None for an image that cannot be decoded."""
        jpegs = list(encoded.data.split(encoded.sizes.tolist()))
        images = self._try_decode(jpegs)
        if images is None:
            return [None if (one := self._try_decode([jpeg])) is None else one[0] for jpeg in jpegs]
        return [*images]

    def _try_decode(self, jpegs: list[Tensor]) -> list[Tensor] | None:
        """None if the library refuses one of them; it does not say which."""
        try:
            return self._decode(jpegs, self.device)
        except RuntimeError as error:
            if "out of memory" in str(error):  # not caused by a damaged image
                raise
            return None

    def _resize(self, crop: Tensor) -> Tensor:
        data = self.cpu_dataset.batch_builder.data
        side = (data.image_size, data.image_size)
        resized = F.interpolate(crop[None].float(), side, mode=data.interpolation, antialias=True)
        return resized[0].round().clamp(0, 255).to(torch.uint8)

    def _replace_row(self, batch: Batch, row: int) -> Batch:
        """The batch with this row made by the CPU path, which may substitute another sample."""
        position = batch.positions[row : row + 1].numpy()
        one = self.cpu_dataset[position, position[None]][0]
        changes: dict[str, Any] = {"damage": (*batch.damage, *one.damage)}
        for name in ("images", "ids", "boxes", "labels"):
            old, new = getattr(batch, name), getattr(one, name)
            if old is not None:
                changes[name] = old.clone()
                changes[name][row] = new[0].to(old.device)
        return replace(batch, **changes)


@lru_cache
def jpeg_library() -> tuple[JpegDecoder, str]:
    """(decoder, name and version) of TorchCodec if it is installed (0.16 is its first with JPEGs), else torchvision."""
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError):  # system libraries that it needs may be missing
        from torchvision.io import ImageReadMode
        from torchvision.io import decode_jpeg as torchvision_decode_jpeg

        return (
            lambda jpegs, device: torchvision_decode_jpeg(jpegs, ImageReadMode.RGB, device),
            _with_version("torchvision"),
        )
    return lambda jpegs, device: decode_jpeg(jpegs, mode="RGB", device=device), _with_version("torchcodec")


def check(device: torch.device) -> None:
    """Raises UserError if no JPEG can be decoded there; without it every image would silently take the CPU path."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    decode, name = jpeg_library()
    try:
        decode([torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)], device)
    except Exception as error:  # a build without the right libraries may raise anything
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"data.decoder = device: {name} decodes no JPEG on {device} ({reason}); install torchcodec >= 0.16 for "
            f"CUDA, or start a run with data.decoder={default_decoder()}"
        ) from None


def explain() -> str:
    """Which decoder this machine uses, and why."""
    name = jpeg_library()[1]
    if torch.cuda.is_available():
        return f"nvJPEG through {name}, crop and resize on the GPU; the workers decode all but plain JPEGs"
    return f"libjpeg-turbo through {name} in the trainer's process: no GPU here, data.decoder=simplejpeg is faster"


def _with_version(package: str) -> str:
    return f"{package} {version(package)}"
