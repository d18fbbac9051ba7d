"""`mimscale.load_encoder`: a frozen network out of any checkpoint, and what it returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimscale.api import arguments
from mimscale.api.images import Images, normalised_batch
from mimscale.api.pretrained_folder import Pretrained, folder_of, load_folder
from mimscale.convert.networks import student_from
from mimscale.errors import UserError
from mimscale.models.vit import LN_EPS
from mimscale.types import IMAGENET_MEAN, IMAGENET_STD

MOST_HEADS = 1024


class Features(NamedTuple):
    """What an encoder makes of B images; float32, whatever type the network computes in.

    tokens: [B, L, D], of the patches in raster order, after the last norm. cls: [B, D], the class token after the last
    norm; None for a network without one. pooled: [B, D], the mean of `tokens` over the patches.
    """

    tokens: Tensor
    cls: Tensor | None
    pooled: Tensor


class Encoder(nn.Module):
    """A network in eval mode whose parameters are frozen; made by `mimscale.load_encoder`.

    network: the ViT, Beit or ConvViT of this package, or timm's model. width: D. patch: pixels per side of a patch;
    grid: rows and columns of patches; image_size: pixels per side of an input. mean, std: of the normalisation, for
    pixels in 0..1. prefix: tokens before those of the patches (class token, registers).
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        width: int,
        patch: int,
        grid: tuple[int, int],
        prefix: int,
        has_cls: bool,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.network: Any = network
        self.width, self.patch, self.grid, self.image_size = width, patch, grid, grid[0] * patch
        self.prefix, self.has_cls = prefix, has_cls
        self.mean, self.std = mean, std
        self.eval().requires_grad_(False)

    def extra_repr(self) -> str:
        return f"width={self.width}, patch={self.patch}, image_size={self.image_size}, has_cls={self.has_cls}"

    def preprocess(self, images: Images) -> Tensor:
        """Images as `forward` takes them -> float32 [B, 3, image_size, image_size], normalised, on the device.

        Raises UserError.
        """
        device = next(self.network.parameters()).device
        return normalised_batch(images, self.image_size, self.mean, self.std, device)

    def forward(self, images: Images) -> Features:
        """images: a list of Pillow images of any size; uint8 [B, 3, H, W]; or floating point [B, 3, image_size,
        image_size], taken as normalised with `mean` and `std`. They may be on any device.

        Pillow images are resized and cropped in the centre as `mimscale evaluate` does it with stored images: short
        side to image_size / 0.875, bicubic. So are uint8 tensors, except those of image_size x image_size, which are
        taken as cropped already. A network whose training has no last norm (MaskAlign) gets one of weight 1 and bias 0,
        as in evaluation. Gradients reach float images that ask for them. Raises UserError.
        """
        pixels = self.preprocess(images).to(next(self.network.parameters()).dtype)
        timm_model = hasattr(self.network, "forward_features")
        tokens: Tensor = self.network.forward_features(pixels) if timm_model else self.network(pixels).tokens
        if isinstance(self.network.norm, nn.Identity):
            tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=LN_EPS)
        tokens = tokens.float()
        patches = tokens[:, self.prefix :]
        return Features(patches, tokens[:, 0] if self.has_cls else None, patches.mean(dim=1))


def load_encoder(
    path: str | Path,
    *,
    ema: bool = False,
    image_size: int | None = None,
    heads: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Encoder:
    """The encoder of a checkpoint, frozen and in eval mode: images -> tokens, class token and mean.

    path: a run folder (its newest checkpoint), one checkpoint folder, a file that `mimscale convert` wrote, an official
        file of a method (.pth, .safetensors), a folder that timm saved (config.json with `architecture`, and
        model.safetensors or pytorch_model.bin), or one of Hugging Face transformers (config.json with `model_type` vit,
        vit_mae, beit, clip or clip_vision_model). Of such a folder the file of weights may be named instead. Nothing is
        downloaded, and no code in a file is run.
    ema: the exponential moving average of the weights, where the run kept one.
    image_size: pixels per side; None: as it was trained. Positions are resized bicubically.
    heads: attention heads of an official file of an unusual size; its weights do not say how many.
    device: None is the CPU. dtype: of weights and computation; None is float32.

    Images are normalised with ImageNet's mean and standard deviation, except for a timm or transformers folder, which
    says its own. Raises mimscale.UserError with one line for whatever cannot be read or does not fit.

    >>> import torch, mimscale
    >>> encoder = mimscale.load_encoder("runs/first")
    >>> encoder.width, encoder.patch, encoder.grid, encoder.image_size
    (64, 8, (6, 6), 48)
    >>> tokens, cls, pooled = encoder(torch.zeros(2, 3, 64, 80, dtype=torch.uint8))
    >>> tokens.shape, cls.shape, pooled.shape
    (torch.Size([2, 36, 64]), torch.Size([2, 64]), torch.Size([2, 64]))
    """
    place, ema = arguments.path("path", path), arguments.flag("ema", ema)
    if image_size is not None:
        image_size = arguments.whole_number("image_size", image_size, 1, arguments.LARGEST_IMAGE)
    if heads is not None:
        heads = arguments.whole_number("heads", heads, 1, MOST_HEADS)
    target, kind = arguments.device(device), arguments.float_type(dtype)
    folder = folder_of(place)
    if folder is not None:
        for name, given in (("ema", ema), ("heads", heads)):
            if given:
                raise UserError(f"{name} = {given}: {folder} says all that there is to choose; leave {name} out")
        encoder = _pretrained(load_folder(folder, image_size))
    else:
        network, info = student_from(place, image_size=image_size, heads=heads, ema=ema)
        config, prefix = info.config, network.prefix
        encoder = Encoder(
            network, width=config.width, patch=config.patch, grid=network.grid, prefix=prefix, has_cls=prefix > 0
        )
    return encoder.to(device=target, dtype=kind)


def _pretrained(found: Pretrained) -> Encoder:
    model = found.model
    return Encoder(
        model,
        width=model.embed_dim,
        patch=model.patch_embed.patch_size[0],
        grid=model.patch_embed.grid_size,
        prefix=model.num_prefix_tokens,
        has_cls=getattr(model, "cls_token", None) is not None,
        mean=found.mean,
        std=found.std,
    )
