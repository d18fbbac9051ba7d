"""Features of frozen networks: one pass over a data set for all networks that take images of the same size."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimscale.data.loader import eval_batches, listed_batches
from mimscale.data.manifest import Manifest
from mimscale.errors import UserError
from mimscale.models.beit import Beit
from mimscale.models.convvit import ConvViT
from mimscale.models.vit import LN_EPS, ViT
from mimscale.types import Batch

Pooling = Literal["mean", "cls", "tokens", "blocks"]
"""mean: of the patch tokens [B, D]; cls: the class token [B, D]; tokens: the patch tokens as they are [B, T, D].
blocks: class token and mean of the patch tokens of each of the last blocks [B, L, 2, D], the last block last; without a
class token the mean alone [B, L, 1, D]."""
Key = tuple[str, str]
"""Name of a network, pooling."""
Student = ViT | Beit | ConvViT
Extractor = Callable[[Tensor], dict[str, Tensor]]
"""float32 ImageNet-normalised images [B, 3, H, W] -> pooling -> float32 features."""

PIXELS = "pixels"
PIXEL_SIDE = 32  # larger images are averaged down to it: 3,072 numbers per image


def frozen(vit: Student, pools: Sequence[Pooling], blocks: int = 1) -> Extractor:
    """Tokens after the last norm, in the type of the network's parameters, pooled.

    blocks: L of the pooling "blocks"; all blocks if there are fewer. The last norm is applied to the output of each.
    A student without a last norm (MaskAlign trains none) gets one of weight 1 and bias 0, as in MaskAlign's own linear
    probe. ConvMAE's encoder keeps the fusion that it was trained with. Raises UserError for cls without a class token.
    """
    if "cls" in pools and not vit.prefix:
        raise UserError("--pool cls: this network has no class token; choose --pool mean")
    vit = vit.eval().requires_grad_(False)
    depth = vit.config.depth
    levels = range(max(0, depth - blocks), depth - 1) if "blocks" in pools else ()

    def normed(tokens: Tensor) -> Tensor:
        if not isinstance(vit.norm, nn.LayerNorm):
            return F.layer_norm(tokens, tokens.shape[-1:], eps=LN_EPS)
        normalised: Tensor = vit.norm(tokens)
        return normalised

    def summary(tokens: Tensor) -> Tensor:
        """[B, 2, D], or [B, 1, D] without a class token."""
        return torch.cat([tokens[:, : vit.prefix], tokens[:, vit.prefix :].mean(dim=1, keepdim=True)], dim=1)

    @torch.no_grad()
    def extract(images: Tensor) -> dict[str, Tensor]:
        out = vit(images, levels=levels)
        tokens = out.tokens if isinstance(vit.norm, nn.LayerNorm) else normed(out.tokens)
        tokens = tokens.float()
        patches = tokens[:, vit.prefix :]
        found = {"mean": lambda: patches.mean(dim=1), "cls": lambda: tokens[:, 0], "tokens": lambda: patches}
        found["blocks"] = lambda: torch.stack(
            [*(summary(normed(out.levels[level]).float()) for level in levels), summary(tokens)], dim=1
        )
        return {pool: found[pool]() for pool in pools}

    return extract


def raw_pixels(images: Tensor) -> dict[str, Tensor]:
    """The image itself, averaged down to 32 x 32 where it is larger: what a network has to beat."""
    return {PIXELS: _reduced(images).flatten(1)}


def raw_pixel_tokens(images: Tensor) -> dict[str, Tensor]:
    """The same for a protocol that needs tokens: each pixel is a token of three numbers, [B, at most 1024, 3]."""
    return {PIXELS: _reduced(images).flatten(2).transpose(1, 2)}


def raw_pixel_blocks(images: Tensor) -> dict[str, Tensor]:
    """The same for a protocol that needs blocks: one block without a class token, [B, 1, 1, 3072]."""
    return {PIXELS: _reduced(images).flatten(1)[:, None, None]}


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
        found, real = _features(images, extractors, device)
        labels = images.labels
        if labels is None:
            labels = torch.full((len(images.images),), -1)
        yield found, labels[:real].to(device, copy=True)  # the loader's memory is given back


def chunks(
    wanted: Mapping[int, Collection[str]],
    extractors: Mapping[str, Extractor],
    manifest: Manifest,
    image_size: int,
    *,
    length: int,
    batch: int,
    workers: int,
    crop_pct: float,
    device: torch.device,
) -> Iterator[tuple[int, dict[Key, Tensor]]]:
    """(number of the chunk, {(name, pooling): float32 [n, ...] in host memory}) of chunks of `length` samples.

    wanted: number -> names of the networks that it is to be computed for. A chunk passes through the networks in
    batches of one size, at most `batch`, whoever computes it: its features do not depend on the other chunks.
    """
    batches, owners = [], []
    for number in sorted(wanted):
        ids = np.arange(number * length, min((number + 1) * length, manifest.samples))
        per_chunk = -(-length // batch)
        size = -(-length // per_chunk)
        for start in range(0, len(ids), size):
            some = ids[start : start + size]
            padding = np.full(size - len(some), some[-1])
            weights = (np.arange(size) < len(some)).astype(np.float32)
            batches.append((np.concatenate([some, padding]), weights))
            owners.append((number, start + size >= len(ids)))
    pieces: dict[Key, list[Tensor]] = {}
    loaded = listed_batches(manifest, image_size, batches, workers=workers, crop_pct=crop_pct)
    for (number, last), images in zip(owners, loaded, strict=True):
        some_networks = {name: extractors[name] for name in wanted[number]}
        for key, values in _features(images, some_networks, device)[0].items():
            pieces.setdefault(key, []).append(values.cpu())
        if last:
            yield number, {key: torch.cat(parts) for key, parts in pieces.items()}
            pieces = {}


def _features(
    images: Batch, extractors: Mapping[str, Extractor], device: torch.device
) -> tuple[dict[Key, Tensor], int]:
    """Of the rows of weight 1, which stand first, and how many these are."""
    assert images.weights is not None
    real = int(images.weights.sum())
    pixels = images.to(device).normalised().images
    found = {(n, pool): f[:real] for n, extract in extractors.items() for pool, f in extract(pixels).items()}
    return found, real
