"""Images of any kind that a caller may have -> the normalised batch that a network takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mimscale.data.to_rgb import NoRgb, to_rgb
from mimscale.data.transforms import center_crop, to_pixels
from mimscale.errors import UserError

CROP_PCT = 0.875  # of `mimscale evaluate`
Images = Tensor | Sequence[Image.Image]


def normalised_batch(
    images: Images, image_size: int, mean: Sequence[float], std: Sequence[float], device: torch.device
) -> Tensor:
    """float32 [B, 3, image_size, image_size] on `device`, per channel (value / 255 - mean) / std.

    images: a list of Pillow images of any size and mode, which are resized and cropped in the centre as evaluation does
    it; or uint8 [B, 3, H, W], where those of image_size x image_size are taken as cropped already. A floating-point
    tensor is taken as normalised already and must have the size. Raises UserError.
    """
    if not isinstance(images, Tensor):
        return _normalised(_cropped(images, image_size), mean, std, device)
    shape = " x ".join(map(str, images.shape))
    if images.dim() != 4 or images.shape[1] != 3 or not len(images):
        fix = "add a first dimension with images[None]" if images.dim() == 3 else "give at least one RGB image"
        raise UserError(f"images of shape {shape} are not [B, 3, H, W]; {fix}")
    right_size = images.shape[2:] == (image_size, image_size)
    if images.is_floating_point():
        if not right_size:
            raise UserError(
                f"normalised images of shape {shape} are not {image_size} x {image_size}; resize them before they are "
                "normalised, or give uint8 or Pillow images"
            )
        return images.to(device, torch.float32)
    if images.dtype != torch.uint8:
        raise UserError(f"images of {images.dtype} are neither uint8 (0 to 255) nor floating point (normalised)")
    if not right_size:
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        images = _cropped([Image.fromarray(np.ascontiguousarray(array)) for array in arrays], image_size)
    return _normalised(images, mean, std, device)


def _cropped(images: Sequence[Image.Image], image_size: int) -> Tensor:
    """uint8 [B, 3, image_size, image_size]."""
    if isinstance(images, Image.Image) or not isinstance(images, Sequence):
        raise UserError(f"images is a {type(images).__name__}; give a tensor [B, 3, H, W] or a list of Pillow images")
    wrong = next((image for image in images if not isinstance(image, Image.Image)), None)
    if wrong is not None or not len(images):
        what = "is empty" if wrong is None else f"holds a {type(wrong).__name__}"
        raise UserError(f"the list of images {what}; give Pillow images, or a tensor [B, 3, H, W]")
    try:
        crops = [center_crop(to_rgb(image), image_size, CROP_PCT)[0] for image in images]
    except NoRgb as error:
        raise UserError(f"an image has no defined 8-bit RGB: {error}") from None
    return torch.from_numpy(np.stack([to_pixels(crop) for crop in crops]))


def _normalised(images_B3HW: Tensor, mean: Sequence[float], std: Sequence[float], device: torch.device) -> Tensor:
    shift, scale = (torch.tensor(tuple(values), device=device).view(1, 3, 1, 1) for values in (mean, std))
    return (images_B3HW.to(device).float() / 255 - shift) / scale
