"""Features of frozen networks, streamed through a data set once for all networks that look at the same images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimscale.data.loader import eval_batches
from mimscale.data.manifest import Manifest
from mimscale.errors import UserError
from mimscale.models.beit import Beit
from mimscale.models.convvit import ConvViT
from mimscale.models.vit import LN_EPS, ViT

SharedMemoryPool = Literal["mean", "cls"]
Student = ViT | Beit | ConvViT
Extractor = Callable[[Tensor], dict[str, Tensor]]
"""float32 ImageNet-normalised images [B, 3, H, W] -> pool -> float32 features [B, D]."""

PIXELS = "pixels"
PIXEL_SIDE = 32  # larger pictures are averaged down to it: 3,072 numbers per picture


def frozen(vit: Student, pools: Sequence[SharedMemoryPool]) -> Extractor:
    """Tokens after the last norm, in the type of the network's parameters, pooled.

    mean: of the patch tokens; cls: the class token. A student without a last norm (MaskAlign trains none) gets one of
    weight 1 and bias 0, as in MaskAlign's own linear probe. ConvMAE's encoder keeps the fusion that it was trained
    with. Raises UserError for cls without a class token.
    """
    if "cls" in pools and not vit.prefix:
        raise UserError("--pool cls: this network has no class token; choose --pool mean")
    vit = vit.eval().requires_grad_(False)

    @torch.no_grad()
    def extract(images: Tensor) -> dict[str, Tensor]:
        tokens = vit(images).tokens
        if not isinstance(vit.norm, nn.LayerNorm):
            tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=LN_EPS)
        tokens = tokens.float()
        return {pool: tokens[:, vit.prefix :].mean(dim=1) if pool == "mean" else tokens[:, 0] for pool in pools}

    return extract


def raw_pixels(images: Tensor) -> dict[str, Tensor]:
    """The picture itself, averaged down to 32 x 32 where it is larger: what a network has to beat."""
    if images.shape[-1] > PIXEL_SIDE:
        images = F.adaptive_avg_pool2d(images, PIXEL_SIDE)
    return {PIXELS: images.flatten(1)}


def random_like(vit: Student, seed: int) -> Student:
    """The same class and shape at its own initialisation. The global generators are left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return vit.untrained()


def stream(
    extractors: Mapping[str, Extractor],
    manifest: Manifest,
    image_size: int,
    *,
    batch: int,
    workers: int,
    crop_pct: float,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[dict[tuple[str, str], Tensor], Tensor]]:
    """({(name, pool): float32 [B, D]}, int64 labels [B]) on `device`, batch by batch: every sample of this rank's part
    once, in order.

    All ranks pass equally many batches of one size through the networks (see `eval_batches`); B leaves out the rows of
    weight 0, which fill these up, and may be 0.
    """
    options = {"batch": batch, "workers": workers, "rank": rank, "world": world}
    for images in eval_batches(manifest, image_size, crop_pct=crop_pct, **options):
        assert images.labels is not None and images.weights is not None
        real = int(images.weights.sum())  # the others stand at the end
        images = images.to(device).normalised()
        seen = {(n, pool): f[:real] for n, extract in extractors.items() for pool, f in extract(images.images).items()}
        assert images.labels is not None
        yield seen, images.labels[:real]
