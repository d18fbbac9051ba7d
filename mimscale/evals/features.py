"""Features of frozen networks: one pass over a data set for all networks that take images of the same size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

Pooling = Literal["mean", "cls", "tokens"]
"""mean: of the patch tokens [B, D]; cls: the class token [B, D]; tokens: the patch tokens as they are [B, T, D]."""
Key = tuple[str, str]
"""Name of a network, pooling."""
Student = ViT | Beit | ConvViT
Extractor = Callable[[Tensor], dict[str, Tensor]]
"""float32 ImageNet-normalised images [B, 3, H, W] -> pooling -> float32 features."""

PIXELS = "pixels"
PIXEL_SIDE = 32  # larger images are averaged down to it: 3,072 numbers per image


def frozen(vit: Student, pools: Sequence[Pooling]) -> Extractor:
    """Tokens after the last norm, in the type of the network's parameters, pooled.

    A student without a last norm (MaskAlign trains none) gets one of weight 1 and bias 0, as in MaskAlign's own linear
    probe. ConvMAE's encoder keeps the fusion that it was trained with. Raises UserError for cls without a class token.
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
        patches = tokens[:, vit.prefix :]
        return {
            pool: patches.mean(dim=1) if pool == "mean" else tokens[:, 0] if pool == "cls" else patches
            for pool in pools
        }

    return extract


def raw_pixels(images: Tensor) -> dict[str, Tensor]:
    """The image itself, averaged down to 32 x 32 where it is larger: what a network has to beat."""
    return {PIXELS: _reduced(images).flatten(1)}


def raw_pixel_tokens(images: Tensor) -> dict[str, Tensor]:
    """The same for a protocol that needs tokens: each pixel is a token of three numbers, [B, at most 1024, 3]."""
    return {PIXELS: _reduced(images).flatten(2).transpose(1, 2)}


def _reduced(images: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(images, PIXEL_SIDE) if images.shape[-1] > PIXEL_SIDE else images


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
) -> Iterator[tuple[dict[Key, Tensor], Tensor]]:
    """({(name, pooling): float32 [B, ...]}, int64 labels [B]) on `device`, batch by batch: every sample of this rank's
    part once, in order. Labels are -1 where the data set has none.

    All ranks pass equally many batches of one size through the networks (see `eval_batches`); B leaves out the rows of
    weight 0, which fill these up, and may be 0.
    """
    options = {"batch": batch, "workers": workers, "rank": rank, "world": world}
    for images in eval_batches(manifest, image_size, crop_pct=crop_pct, **options):
        assert images.weights is not None
        real = int(images.weights.sum())  # the others stand at the end
        images = images.to(device).normalised()
        found = {(n, pool): f[:real] for n, extract in extractors.items() for pool, f in extract(images.images).items()}
        labels = images.labels
        if labels is None:
            labels = torch.full((len(images.images),), -1, device=device)
        yield found, labels[:real].clone()  # the loader's memory is given back


def collect(batches: Iterable[tuple[dict[Key, Tensor], Tensor]]) -> tuple[dict[Key, Tensor], Tensor]:
    """All of a `stream` in host memory: {(name, pooling): float32 [N, ...]}, int64 labels [N].

    Takes N x D x 4 bytes for each network and pooling.
    """
    pieces: dict[Key, list[Tensor]] = {}
    labels = []
    for features, of_batch in batches:
        for key, piece in features.items():
            pieces.setdefault(key, []).append(piece.cpu())
        labels.append(of_batch.cpu())
    return {key: torch.cat(parts) for key, parts in pieces.items()}, torch.cat(labels)
