"""`data.decoder: device`: the trainer's process decodes, crops and resizes on the device what the workers only read.

A worker hands on the bytes of a plain JPEG, its crop box and its flip (see `Batch.stored`). Here they go through
nvJPEG on a GPU, through libjpeg-turbo on a CPU: that is the same code for machines without one, tests above all, and
slower than the workers. What is no plain whole JPEG the workers decode themselves, and a JPEG that the device refuses
is made anew by the exact path, with its retries and substitutes; so damage is met, counted and replaced as ever.
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
from mimscale.data.samples import TrainSamples
from mimscale.errors import UserError
from mimscale.types import Batch, EncodedImages

Jpegs = Callable[[list[Tensor], torch.device], list[Tensor]]


class DeviceDecoder:
    """Batch -> the same with all its images, on the device. exact: makes a batch of its own of any position."""

    def __init__(self, exact: TrainSamples, device: torch.device):
        self.exact, self.device = exact, device
        self._decode, _ = library()

    def __call__(self, batch: Batch) -> Batch:
        stored = batch.stored
        if stored is None:
            return batch
        images, failed = batch.images.to(self.device, non_blocking=True), []
        for row, box, picture in zip(stored.rows.tolist(), stored.boxes.tolist(), self._pictures(stored), strict=True):
            top, left, height, width = box
            if picture is None or picture.shape[1] < top + height or picture.shape[2] < left + width:
                failed.append(row)
                continue
            crop = picture[:, top : top + height, left : left + width]
            images[row] = self._resized(crop.flip(-1) if batch.flips[row] else crop)
        batch = replace(batch, images=images, stored=None)
        for row in failed:
            batch = self._replaced(batch, row)
        return batch

    def _pictures(self, stored: EncodedImages) -> list[Tensor | None]:
        """uint8 [3, H, W] each; None for what cannot be decoded."""
        parts = list(stored.data.split(stored.sizes.tolist()))
        together = self._tried(parts)
        if together is None:
            return [None if (one := self._tried([part])) is None else one[0] for part in parts]
        return [*together]

    def _tried(self, parts: list[Tensor]) -> list[Tensor] | None:
        """None where one of them is refused; it is not said which."""
        try:
            return self._decode(parts, self.device)
        except RuntimeError as error:
            if "out of memory" in str(error):  # no fault of theirs
                raise
            return None

    def _resized(self, crop: Tensor) -> Tensor:
        data = self.exact.crops.data
        side = (data.image_size, data.image_size)
        resized = F.interpolate(crop[None].float(), side, mode=data.interpolation, antialias=True)
        return resized[0].round().clamp(0, 255).to(torch.uint8)

    def _replaced(self, batch: Batch, row: int) -> Batch:
        """The row as the exact path makes it, which may be another sample."""
        at = batch.positions[row : row + 1].numpy()
        one = self.exact[at, at[None]][0]
        changes: dict[str, Any] = {"damage": (*batch.damage, *one.damage)}
        for name in ("images", "ids", "boxes", "labels"):
            whole, new = getattr(batch, name), getattr(one, name)
            if whole is not None:
                changes[name] = whole.clone()
                changes[name][row] = new[0].to(whole.device)
        return replace(batch, **changes)


@lru_cache
def library() -> tuple[Jpegs, str]:
    """What decodes: TorchCodec where it is installed (0.16 is its first with JPEGs), else torchvision, and its name."""
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError):  # it may miss libraries of the system
        from torchvision.io import ImageReadMode
        from torchvision.io import decode_jpeg as by_torchvision

        return lambda parts, device: by_torchvision(parts, ImageReadMode.RGB, device), _named("torchvision")
    return lambda parts, device: decode_jpeg(parts, mode="RGB", device=device), _named("torchcodec")


def check(device: torch.device) -> None:
    """Raises UserError where nothing can be decoded there: every picture would quietly take the exact path."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    decode, name = library()
    try:
        decode([torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)], device)
    except Exception as error:  # whatever a build without the right libraries raises
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"data.decoder = device: {name} decodes no JPEG on {device} ({reason}); install torchcodec >= 0.16 for "
            f"CUDA, or start a run with data.decoder={default_decoder()}"
        ) from None


def explain() -> str:
    """Which path this machine takes, and why."""
    name = library()[1]
    if torch.cuda.is_available():
        return f"nvJPEG through {name}, crop and resize on the GPU; the workers decode what is no plain JPEG"
    return f"libjpeg-turbo through {name} in the trainer's process: no GPU here, data.decoder=simplejpeg is faster"


def _named(package: str) -> str:
    return f"{package} {version(package)}"
